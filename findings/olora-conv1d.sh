#!/usr/bin/env bash
# peft's OLoRA cannot start on GPT-1: its factors have Conv1D's sides exchanged
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Expected: init_lora_weights="olora" on OpenAI GPT's c_attn, c_fc and c_proj works as "pissa" does there: both cut
#   a matrix into factors at the start, and for both the model's outputs stay what they were.
# Happens: with "pissa" they do. With "olora" the model is made without a word, and the first pass fails, since the
#   factors were taken from Conv1D's matrix (inputs, outputs) as if it were (outputs, inputs).
# Hurt: LoRA on GPT-1 and GPT-2, whose matrices are stored like this. Where inputs and outputs are equal in number
#   nothing fails, and the model that training starts from is another one than the base.
# Seen: logits moved at the start: pissa 1.2e-07, olora RuntimeError, olora on square matrices only 5.3e-03
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
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

torch.manual_seed(0)
model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=64)).eval()
ids = torch.arange(3, 23)[None]
right = model(ids).logits


def start(kind, targets):
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=kind, fan_in_fan_out=True)
    try:
        with torch.no_grad():
            return f"{(get_peft_model(copy.deepcopy(model), config).eval()(ids).logits - right).abs().max().item():.1e}"
    except RuntimeError as error:
        return type(error).__name__


every, square = ["c_attn", "c_fc", "c_proj"], r".*\.attn\.c_proj"
pissa, olora, alone = start("pissa", every), start("olora", every), start("olora", square)
print(f"logits moved at the start: pissa {pissa}, olora {olora}, olora on square matrices only {alone}")
if pissa == "RuntimeError" or float(pissa) > 1e-4 or olora != "RuntimeError":
    sys.exit("changed: OLoRA starts on Conv1D")
PY
