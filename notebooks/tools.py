"""What all notebooks use: source on the screen, texts that no training has seen, small pictures."""

import inspect
import textwrap
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from torch import Tensor

from decoders import look
from examples.train_tiny import HELD_OUT_SEED, RECIPES, TRAIN_SEED, Rows, plain_rows


def show(*objects: Any) -> None:
    """The lines of classes and functions, as they stand in their files."""
    for each in objects:
        file = Path(inspect.getsourcefile(each))
        source = textwrap.dedent(inspect.getsource(each))
        display(Markdown(f"`{file.parent.name}/{file.name}`\n```python\n{source}```"))


# ---- Texts ----


def words(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as they are written, spaces visible."""
    return [look.word(tokenizer, int(id)).replace(" ", "␣").replace("\n", "↵") for id in ids]


def rows_of(family: str, tokenizer: Any, seed: int, count: int) -> Rows:
    """Texts of the kind that this tiny checkpoint was trained on: ids and labels (B, T)."""
    return plain_rows(tokenizer, list(islice(RECIPES[family].texts(seed), count)))


def held_out(family: str, tokenizer: Any, count: int = 16) -> Rows:
    """Texts that it was not trained on."""
    return rows_of(family, tokenizer, HELD_OUT_SEED, count)


@torch.no_grad()
def loss_of(model: torch.nn.Module, rows: Rows) -> float:
    """Mean cross-entropy in nats a token. exp of it: among how many tokens it hesitates."""
    return model(rows.ids, labels=rows.labels).loss.item()


# ---- Training ----


def train(
    model: torch.nn.Module, family: str, tokenizer: Any, steps: int, rate: float = 3e-3, batch_size: int = 8
) -> list[float]:
    """The loss of every step of AdamW on stories. What examples/train.py does besides: a schedule, decay,
    accumulation, checkpoints."""
    texts = RECIPES[family].texts(TRAIN_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        rows = plain_rows(tokenizer, list(islice(texts, batch_size)))
        loss = model(rows.ids, labels=rows.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


# ---- Pictures ----


def maps(weights: Tensor, labels: Sequence[str], titles: Sequence[str]) -> Figure:
    """Attention weights (n, T, S) side by side: queries downwards, keys to the right, darker is more."""
    n, T, S = weights.shape
    figure = Figure((2.7 * n + 0.6, 3.2), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, n, squeeze=False)[0]):
        axes.imshow(weights[i].detach().float(), vmin=0, vmax=1, cmap="Blues")
        axes.set_title(titles[i], fontsize=9)
        axes.set_xticks(range(S), labels[-S:], rotation=90, fontsize=7)
        axes.set_yticks(range(T), labels[-T:] if i == 0 else [], fontsize=7)
    return figure


def curves(
    lines: dict[str, Sequence[float]], x: str, y: str, level: tuple[float, str] | None = None
) -> Figure:
    """Lines over their index; `level`: a height to compare with, and what it is."""
    figure = Figure((5.6, 2.8), layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        axes.plot(line, label=name)
    if level:
        axes.axhline(level[0], color="grey", linestyle="dotted", label=level[1])
    axes.set(xlabel=x, ylabel=y)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure
