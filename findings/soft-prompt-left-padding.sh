#!/usr/bin/env bash
# A soft prompt makes a left-padded sequence answer differently from the same sequence alone
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Expected: with prompt tuning, a batch that is padded on the left with its attention mask generates for each sequence
#   what it generates alone, as the same models do without an adapter.
# Happens: peft drops the position ids that generate has counted without the padding (with a warning that they are
#   ignored), so that padding counts as text: the first new token's logits of the padded sequence are off by units.
# Hurt: every batched evaluation of a model with a soft prompt: answers depend on the neighbours' lengths.
# Seen: Phi-3 2.5e-06 without a soft prompt, 3.16 with one; GPT-Neo 2.1e-06 and 6.35
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
env/bin/python - <<'PY'
import sys

import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import GPTNeoConfig, GPTNeoForCausalLM, Phi3Config, Phi3ForCausalLM

base = dict(vocab_size=101, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=48)
phi3 = dict(intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
neo = dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], max_position_embeddings=64)
kinds = {"Phi-3": (Phi3ForCausalLM, Phi3Config(**base, **phi3)), "GPT-Neo": (GPTNeoForCausalLM, GPTNeoConfig(**base, **neo))}


def drawn(model, std):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad and p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * std(p)
    model.tie_weights()
    return model.eval()


def first_logits(model, ids, mask):
    settings = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return model.generate(input_ids=ids, attention_mask=mask, **settings).logits[0][0]


short, pad = torch.randint(3, 101, (1, 9), generator=torch.Generator().manual_seed(1)), torch.zeros(1, 5, dtype=torch.long)
padded, mask = torch.cat([pad, short], 1), torch.cat([pad, torch.ones_like(short)], 1)
seen = []
for name, (cls, config) in kinds.items():
    plain = drawn(cls(config), lambda p: p.shape[-1] ** -0.5 * 1.5)
    without = first_logits(plain, padded, mask) - first_logits(plain, short, torch.ones_like(short))
    soft = get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    soft = drawn(soft, lambda p: 2.0)
    apart = first_logits(soft, padded, mask) - first_logits(soft, short, torch.ones_like(short))
    seen.append((without.abs().max().item(), apart.abs().max().item()))
    print(f"{name}: padded against alone {seen[-1][0]:.1e} without a soft prompt, {seen[-1][1]:.2f} with one")
if any(without > 1e-3 or apart < 0.1 for without, apart in seen):
    sys.exit("changed: with a soft prompt a padded sequence is the sequence alone")
PY
