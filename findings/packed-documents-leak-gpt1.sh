#!/usr/bin/env bash
# Packed documents are kept apart in three of four models; in GPT-1 they leak, and nothing says so
#
# Versions: transformers 5.23.0, torch 2.13.0
# Expected: DataCollatorWithFlattening puts documents behind each other with positions that begin anew; a model that
#   takes position_ids either keeps the documents apart or refuses.
# Happens: Phi, GPT-Neo and Persimmon give every document the logits that it has alone. OpenAI GPT takes the same batch,
#   uses the positions for its embeddings, and lets every document read those before it.
# Hurt: padding-free fine-tuning of GPT-1: the loss is that of another text, and looks normal.
# Seen: packed against alone: Phi 1.4e-06, GPT-Neo 2.9e-06, Persimmon 2.0e-06, OpenAI GPT 4.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
env/bin/python - <<'PY'
import sys

import torch
from transformers import (
    DataCollatorWithFlattening,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PersimmonConfig,
    PersimmonForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

base = dict(vocab_size=101, hidden_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)
small = dict(intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
neo = dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], max_position_embeddings=64)
gpt1 = OpenAIGPTConfig(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=64)
kinds = {
    "Phi": PhiForCausalLM(PhiConfig(**base, **small)),
    "GPT-Neo": GPTNeoForCausalLM(GPTNeoConfig(**base, **neo)),
    "Persimmon": PersimmonForCausalLM(PersimmonConfig(**base, **small)),
    "OpenAI GPT": OpenAIGPTLMHeadModel(gpt1),
}
generator = torch.Generator().manual_seed(0)
rows = [{"input_ids": torch.randint(3, 101, (n,), generator=generator).tolist()} for n in (4, 20, 7, 13)]
packed = DataCollatorWithFlattening()(rows)
found = {}
for name, model in kinds.items():
    for p in model.eval().parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 * 1.5
    cache = {} if name == "OpenAI GPT" else {"use_cache": False}  # GPT-1 has none
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row["input_ids"]]), **cache).logits[0] for row in rows])
        together = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], **cache).logits[0]
    found[name] = (together - alone).abs().max().item()
print("packed against alone: " + ", ".join(f"{name} {off:.1e}" for name, off in found.items()))
leaking = found.pop("OpenAI GPT")
if leaking < 0.1 or max(found.values()) > 1e-3:
    sys.exit("changed: GPT-1 keeps packed documents apart, or another model no longer does")
PY
