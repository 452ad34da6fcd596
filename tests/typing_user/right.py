"""A user's script without a mistake: `test_typing.py` wants no error in it."""

import torch

from decoders import decoding, find, model_class, read_config, tokenize, weights
from decoders.phi import PhiConfig, PhiForCausalLM
from decoders.tokenize import Tokenizer

folder = find("checkpoints/tiny-phi")
model = weights.load(PhiForCausalLM, folder, dtype=torch.float32)
config: PhiConfig = model.config
tokenizer: Tokenizer = tokenize.load(folder)
ids = torch.tensor([tokenizer.encode("Once upon a time")])
answer: torch.Tensor = model.generate(ids, max_new_tokens=20, do_sample=True, temperature=0.8, top_k=50)
text: str = tokenizer.decode(answer[0].tolist(), skip_special_tokens=True)
logits = model(ids).logits
beams = decoding.generate(model, ids, num_beams=4, max_new_tokens=8)
fresh = PhiForCausalLM(PhiConfig(hidden_size=64, num_attention_heads=4))
any_model = weights.load(model_class(read_config(folder)), folder)
weights.save(model, "elsewhere", tokenizer)
