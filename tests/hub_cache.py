"""The tiny checkpoints as the hub's cache holds what was fetched: for a user without network.

    python -m tests.hub_cache FOLDER      then HF_HOME=FOLDER HF_HUB_OFFLINE=1 ...

They get heads of every kind, so that whoever loads one finds the same numbers, and Phi-3 a chat template; with
`DECODERS_TEST_DATA` the real vocabularies too, with random rows in the token table.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
IDS = {
    "tiny-phi": ("phi-2", "microsoft/phi-1", "microsoft/phi-1_5", "microsoft/phi-2"),
    "tiny-phi3": (
        "microsoft/Phi-3-mini-4k-instruct",
        "microsoft/phi-3-mini-4k-instruct",
        "meta-phi3/Phi3-2-7b-hf",
    ),
    "tiny-persimmon": ("adept/persimmon-8b-base",),
    "tiny-fuyu": ("adept/fuyu-8b", "adept-hf-collab/fuyu-8b"),
    "tiny-gpt-neo": ("EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B", "EleutherAI/gpt-neo-2.7B"),
    "tiny-openai-gpt": ("openai-gpt",),
}
HEADS = {  # name -> rows
    "tiny-phi": {"score": 2, "classifier": 2},
    "tiny-phi3": {"score": 2},
    "tiny-persimmon": {"score": 2},
    "tiny-fuyu": {},
    "tiny-gpt-neo": {"score": 2, "classifier": 2, "qa_outputs": 2},
    "tiny-openai-gpt": {"score": 2, "multiple_choice_head.summary": 1},
}
TABLES = ("embed_tokens.weight", "wte.weight", "tokens_embed.weight")
TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
REAL = {
    "tiny-phi": ("phi-2", 51200, 50256),
    "tiny-phi3": ("phi-3-mini-4k", 32064, 32000),
    "tiny-gpt-neo": ("gpt-neo-125m", 50257, 50256),
    "tiny-openai-gpt": ("openai-gpt", 40478, None),
}
PHI3_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def with_heads(name: str, folder: Path) -> None:
    shutil.copytree(CHECKPOINTS / name, folder, ignore=shutil.ignore_patterns("*.png", "training.json"))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    width = next(t for key, t in tensors.items() if key.endswith(TABLES)).shape[1]
    generator = torch.Generator().manual_seed(5)
    for head, rows in HEADS[name].items():
        weight = torch.randn(rows, width, generator=generator) / width**0.5
        if head == "classifier" and name == "tiny-phi":  # what 4.37 calls it
            weight = tensors["score.weight"].float()
        tensors |= {f"{head}.weight": weight.half(), f"{head}.bias": torch.linspace(-0.3, 0.4, rows).half()}
    if os.environ.get("DECODERS_TEST_DATA") and name in REAL:
        with_real_vocabulary(name, folder, tensors, generator)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if name == "tiny-phi3":
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": PHI3_CHAT}))


def with_real_vocabulary(name: str, folder: Path, tensors: dict, generator: torch.Generator) -> None:
    """The examples' texts are as long as they were meant to be; the new words mean nothing to the model."""
    source, rows, eos = REAL[name]
    for file in (folder / file for file in TOKENIZER if (folder / file).exists()):
        file.unlink()
    for file in TOKENIZER:
        if (Path(os.environ["DECODERS_TEST_DATA"]) / "hub" / source / file).exists():
            shutil.copyfile(Path(os.environ["DECODERS_TEST_DATA"]) / "hub" / source / file, folder / file)
    for key, tensor in list(tensors.items()):
        if key.endswith((*TABLES, "lm_head.weight", "lm_head.bias")):
            tensors[key] = (torch.randn(rows, *tensor.shape[1:], generator=generator) * 0.3).half()
    for file in ("config.json", "generation_config.json"):
        content = json.loads((folder / file).read_text())
        sizes = {"vocab_size": rows} if file == "config.json" else {}
        (folder / file).write_text(json.dumps({**content, **sizes, "bos_token_id": eos, "eos_token_id": eos}))


def build(target: Path) -> Path:
    """`target` as HF_HOME. The folder of a snapshot is `target / "folders" / name`."""
    for name, ids in IDS.items():
        made = target / "folders" / name
        with_heads(name, made)
        for id in ids:
            at = target / "hub" / ("models--" + id.replace("/", "--"))
            revision = "0" * 40
            (at / "refs").mkdir(parents=True)
            (at / "refs" / "main").write_text(revision)
            (at / "snapshots").mkdir()
            (at / "snapshots" / revision).symlink_to(made.resolve())
    return target


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
