"""Texts as ids, in crops of one length: what `examples/train.py` learns from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor, dict]  # ids, labels (B, T), -100 where nothing is learnt; other inputs


def read_texts(path: Path) -> list[str]:
    """The file, or every .txt and .md file below the folder. ValueError where there is no text."""
    files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md")) if path.is_dir() else [path]
    texts = [file.read_text("utf-8", errors="replace") for file in files]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{path} holds no text: name a text file, or a folder with .txt or .md files")
    return texts


def split(texts: list[str], tokenizer: Any, T: int) -> tuple[Tensor, Tensor]:
    """Ids to learn from, and those of the last twentieth, which is held out: 8 crops at most. ValueError for
    fewer than one crop of T in each."""
    ids = torch.tensor([id for text in texts for id in [*tokenizer.encode(text), tokenizer.eos_token_id]])
    cut = max(T, len(ids) // 20)
    if len(ids) < 2 * cut:
        raise ValueError(f"the text has {len(ids)} tokens, too few for --context {T}: {2 * cut} are needed")
    return ids[:-cut], ids[-cut:][: 8 * T]


def crops(ids: Tensor, B: int, T: int, generator: torch.Generator) -> Iterator[Batch]:
    """(B, T) ids from anywhere in the text, without end."""
    while True:
        starts = torch.randint(len(ids) - T + 1, (B,), generator=generator).tolist()
        rows = torch.stack([ids[start : start + T] for start in starts])
        yield rows, rows, {}
