#!/usr/bin/env bash
# peft's unload does not give the base model back where whole layers were trained
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Expected: model.unload() removes the adapter without merging it: what is left is the base model, just as
#   `with model.disable_adapter():` computes with it.
# Happens: layers named in modules_to_save stay trained. Here the output layer, tied before, stays a trained copy of
#   its own, so that the model that comes back is neither the base nor the adapted one.
# Hurt: loops that load an adapter, evaluate, unload and go on with the next: each starts from the last one's head.
# Seen: adapted 2.71, disabled 0, unloaded 2.72
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
env/bin/python - <<'PY'
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoConfig, GPTNeoForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=101, hidden_size=48, num_layers=2, num_heads=4, max_position_embeddings=64)
kinds = [[["global", "local"], 1]]
base = GPTNeoForCausalLM(GPTNeoConfig(attention_types=kinds, bos_token_id=1, eos_token_id=2, **sizes)).eval()
ids = torch.arange(3, 23)[None]
lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
model = get_peft_model(copy.deepcopy(base), lora).eval()
for p in model.parameters():
    if p.requires_grad:  # as if it had been trained
        p.data += 0.1 * torch.randn_like(p)


@torch.no_grad()
def apart(model):
    return (model(ids).logits - base(ids).logits).abs().max().item()


adapted = apart(model)
with model.disable_adapter():
    disabled = apart(model)
unloaded = apart(model.unload())
print(f"logits against the base: adapted {adapted:.2f}, disabled {disabled:.2g}, unloaded {unloaded:.2f}")
if disabled > 1e-5 or unloaded < 0.05:
    sys.exit("changed: unload gives the base model back")
PY
