"""A user's script with mistakes: `test_typing.py` wants each marked line found, and no other."""

import torch

from decoders import tokenize, weights
from decoders.phi import PhiConfig, PhiForCausalLM

model = weights.load(PhiForCausalLM, "checkpoints/tiny-phi", dtyp=None, device=3)  # wrong
tokenizer = tokenize.load("checkpoints/tiny-phi")
ids = torch.tensor([tokenizer.encode("Once upon a time")])
model.generate(ids, max_new_token=20)  # wrong
model.generate(ids, max_new_tokens="20")  # wrong
print(model.generate(ids, max_new_tokens=2).shap)  # wrong
text: int = tokenizer.decode([1, 2])  # wrong
tokenizer.encode(["Once"])  # wrong
PhiConfig(hiden_size=64)  # wrong
model.generat(ids)  # wrong
