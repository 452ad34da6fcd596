#!/usr/bin/env bash
# A parametrization of a tied matrix unties it in silence, and both train apart
#
# Versions: transformers 5.23.0, torch 2.13.0
# Expected: weight_norm on GPT-Neo's token embedding reparametrizes the shared matrix: lm_head, tied to it, follows.
# Happens: the embedding computes its matrix from two new parameters; lm_head keeps the old parameter object, which
#   the optimizer goes on training by itself. After one step the two matrices, equal before, differ.
#   model.config.tie_word_embeddings still says True, and save_pretrained goes by that.
# Hurt: weight and spectral normalisation, orthogonal maps, and all that is built on torch.nn.utils.parametrize.
# Seen: the same parameter before: True, after: False; apart by 0.16 after one step
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
env/bin/python - <<'PY'
import sys

import torch
from torch.nn.utils.parametrizations import weight_norm
from transformers import GPTNeoConfig, GPTNeoForCausalLM

torch.manual_seed(0)
kinds = [[["global", "local"], 1]]
sizes = dict(vocab_size=101, hidden_size=48, num_layers=2, num_heads=4, max_position_embeddings=64)
model = GPTNeoForCausalLM(GPTNeoConfig(attention_types=kinds, bos_token_id=1, eos_token_id=2, **sizes))
ids = torch.arange(3, 23)[None]
before = model.lm_head.weight is model.transformer.wte.weight
weight_norm(model.transformer.wte)
after = model.lm_head.weight is model.transformer.wte.weight
optimizer = torch.optim.SGD(model.parameters(), 1.0)
model(ids, labels=ids).loss.backward()
optimizer.step()
apart = (model.lm_head.weight - model.transformer.wte.weight).abs().max().item()
print(f"the same parameter before: {before}, after: {after}; apart by {apart:.2f} after one step")
if not before or apart < 1e-3:
    sys.exit("changed: the tied matrices stay one")
PY
