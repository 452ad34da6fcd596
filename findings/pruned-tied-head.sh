#!/usr/bin/env bash
# Pruning the output layer of a tied model is lost by save_pretrained, without a word
#
# Versions: transformers 5.23.0, torch 2.13.0
# Expected: torch.nn.utils.prune on lm_head of GPT-Neo, whose matrix is the token embedding's, prunes both, or is
#   refused; or at least save_pretrained says that it cannot store the result.
# Happens: the mask is put on lm_head only; the embedding keeps every number. The model in memory has a head half
#   of zeros. Saved and loaded again, the head has none: the two names that pruning made (weight_orig and
#   weight_mask) are no names of the model, and the tie brings the unpruned matrix back. Nothing is raised.
# Hurt: whoever measures a pruned model, saves it and publishes the folder: the numbers are of another model.
# Seen: zeros in memory: head 0.50, embedding 0.00; after loading: head 0.00; logits differ by 0.13
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
env/bin/python - <<'PY'
import sys

import torch
from torch.nn.utils import prune
from transformers import GPTNeoConfig, GPTNeoForCausalLM

torch.manual_seed(0)
kinds = [[["global", "local"], 1]]
sizes = dict(vocab_size=101, hidden_size=48, num_layers=2, num_heads=4, max_position_embeddings=64)
model = GPTNeoForCausalLM(GPTNeoConfig(attention_types=kinds, bos_token_id=1, eos_token_id=2, **sizes)).eval()
ids = torch.arange(3, 23)[None]


def zeros(matrix):
    return (matrix == 0).float().mean().item()


prune.l1_unstructured(model.lm_head, "weight", 0.5)
head, embedding = zeros(model.lm_head.weight), zeros(model.transformer.wte.weight)
model.save_pretrained("pruned")
again = GPTNeoForCausalLM.from_pretrained("pruned").eval()
after = zeros(again.lm_head.weight)
with torch.no_grad():
    apart = (again(ids).logits - model(ids).logits).abs().max().item()
print(f"zeros in memory: head {head:.2f}, embedding {embedding:.2f}; after loading: head {after:.2f}; "
      f"logits differ by {apart:.2f}")
if head < 0.4 or after > 0.1:
    sys.exit("changed: the pruned head survives, or is pruned otherwise")
PY
