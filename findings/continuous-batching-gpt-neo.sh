#!/usr/bin/env bash
# Continuous batching writes another text than generate with GPT-Neo, from the second token on
#
# Versions: transformers 5.23.0, torch 2.13.0
# Expected: model.generate_batch, greedy, gives for every prompt what model.generate gives, for all models that it takes.
# Happens: so it is with Phi and Phi-3. With GPT-Neo the first new token is right and the rest is another text, also
#   for one prompt alone, and whether layers are global or local. Nothing is raised; a logged line
#   says that the attention implementation cannot be set.
# Hurt: serving GPT-Neo (and whatever computes attention in its own way) by generate_batch.
# Seen: generate 91 95 55 94 67 13 5 17, generate_batch 91 51 67 19 0 12 26 64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 psutil
cd "$folder"
env/bin/python - <<'PY'
import sys

import torch
from transformers import GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM, PhiConfig, PhiForCausalLM

base = dict(vocab_size=101, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=48)
neo = dict(num_layers=2, num_heads=4, attention_types=[[["global"], 2]], max_position_embeddings=64)
phi = dict(intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
kinds = {"Phi": (PhiForCausalLM, PhiConfig(**base, **phi)), "GPT-Neo": (GPTNeoForCausalLM, GPTNeoConfig(**base, **neo))}
prompt = torch.randint(3, 101, (14,), generator=torch.Generator().manual_seed(1)).tolist()
equal = {}
for name, (cls, config) in kinds.items():
    model, generator = cls(config).eval(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 * 1.5
    settings = dict(max_new_tokens=8, do_sample=False)
    right = model.generate(torch.tensor([prompt]), eos_token_id=None, **settings)[0, len(prompt) :].tolist()
    batch = GenerationConfig(eos_token_id=-1, pad_token_id=0, **settings)
    found = next(iter(model.generate_batch([prompt], generation_config=batch).values())).generated_tokens
    equal[name] = sum(a == b for a, b in zip(right, found))
    print(f"{name}: generate {right}, generate_batch {found}")
if equal["Phi"] < 8 or equal["GPT-Neo"] > 6:
    sys.exit("changed: generate_batch gives GPT-Neo's greedy text, or Phi's no more")
PY
