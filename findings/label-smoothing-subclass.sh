#!/usr/bin/env bash
# Trainer's label smoothing teaches a subclass to repeat its own input
#
# Versions: transformers 5.23.0, torch 2.13.0, accelerate 1.15.0
# Expected: label_smoothing_factor changes the loss by as little as the factor is, for PhiForCausalLM and for a
#   subclass of it alike: a subclass is the same model under another name.
# Happens: Trainer shifts the labels by one only where the class's name stands in a list of its own. A subclass
#   called MyPhi is not in it: the smoothed loss compares each position with its own token. With a factor of
#   1e-6 the loss of an untrained model moves by tenths, and training makes a model that repeats the last token.
# Hurt: whoever adds a layer or a method to a model by subclassing, and smooths labels. The loss falls nicely.
# Seen: without smoothing 4.618, smoothed 4.618, smoothed subclass 5.087
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
env/bin/python - <<'PY'
import copy
import sys

import torch
from transformers import PhiConfig, PhiForCausalLM, Trainer, TrainingArguments


class MyPhi(PhiForCausalLM):
    pass


torch.manual_seed(0)
sizes = dict(vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
model = PhiForCausalLM(PhiConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
ids = torch.randint(3, 101, (4, 20))
rows = [{"input_ids": row, "labels": row} for row in ids]


def first_loss(model, smoothing):
    settings = dict(max_steps=1, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    arguments = TrainingArguments("out", per_device_train_batch_size=4, label_smoothing_factor=smoothing, **settings)
    trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=rows)
    trainer.train()
    return next(step["loss"] for step in trainer.state.log_history if "loss" in step)


plain, smoothed = first_loss(model, 0.0), first_loss(model, 1e-6)
model.__class__ = MyPhi
subclass = first_loss(model, 1e-6)
print(f"without smoothing {plain:.3f}, smoothed {smoothed:.3f}, smoothed subclass {subclass:.3f}")
if abs(plain - smoothed) > 1e-3 or abs(plain - subclass) < 0.05:
    sys.exit("changed: the subclass's smoothed loss is the class's")
PY
