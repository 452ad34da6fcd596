#!/usr/bin/env bash
# One failed call with assistant_early_exit breaks the model for every later call
#
# Versions: transformers 5.23.0, torch 2.13.0
# Expected: generate(assistant_early_exit=2) on GPT-Neo or Persimmon, whose passes always run all their layers, works or
#   raises; after an error the model is what it was.
# Happens: it raises IndexError, and leaves config.num_hidden_layers at 2. From then on plain generate raises the same
#   error, since a cache is made for 2 layers and 3 ask for one.
# Hurt: notebooks and servers that try a setting, catch the error and go on with the model in memory.
# Seen: before: works; with assistant_early_exit=2: IndexError; after: IndexError; layers 3, config.num_hidden_layers 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
env/bin/python - <<'PY'
import sys

import torch
from transformers import PersimmonConfig, PersimmonForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
model = PersimmonForCausalLM(PersimmonConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
ids = torch.arange(3, 12)[None]


def call(**settings):
    try:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **settings)
        return "works"
    except IndexError as error:
        return f"IndexError: {error}"


before, early, after = call(), call(assistant_early_exit=2), call()
print(f"before: {before}; with assistant_early_exit=2: {early}; after: {after}")
print(f"layers {len(model.model.layers)}, config.num_hidden_layers {model.config.num_hidden_layers}")
if before != "works" or after == "works":
    sys.exit("changed: the model survives a failed early exit, or early exit works")
PY
