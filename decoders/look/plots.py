"""Figures of a trace for notebooks and papers, by matplotlib (`pip install '.[plot]'`).

    trace.plot.attention(2, 1)      # who reads whom in layer 2, head 1
    trace.plot.lens()               # the likeliest next token after each layer
    trace.plot.norms()              # the length of the residual stream, layer by layer

Each gives a `matplotlib.figure.Figure`, which a notebook shows by itself; `savefig("a.pdf")` writes it. No
window is opened and pyplot's state is not touched.
"""

import io
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .words import word

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = 64  # tokens that are written at an axis


class Plots:
    """The figures of one trace, of its row `row`; `tokenizer` writes tokens instead of ids."""

    def __init__(self, trace: Any, tokenizer: Any = None, row: int = 0):
        self.trace, self.tokenizer, self.row = trace, tokenizer, row

    def with_tokenizer(self, tokenizer: Any) -> "Plots":
        """The same with tokens as text."""
        return Plots(self.trace, tokenizer, self.row)

    @torch.no_grad()
    def attention(self, layer: int, head: int) -> "Figure":
        """The weights of one head, (T, S): queries downwards, keys to the right. ValueError for a layer or a
        head that the model does not have."""
        f = self.trace.f
        if layer not in f.layers or not 0 <= head < f.H:
            known = f"layers are 0 to {len(f.layers) - 1}, heads 0 to {f.H - 1}"
            raise ValueError(f"there is no layer {layer}, head {head}: {known}")
        weights = self.trace[f"layers.{layer}.weights"][self.row, head].float().cpu().numpy()
        figure = new_figure(0.22 * weights.shape[1] + 2.2, 0.22 * weights.shape[0] + 1.6)
        axes = figure.add_subplot()
        image = axes.imshow(weights, vmin=0, vmax=1, cmap="Blues", aspect="equal")
        keys = self.words()
        if weights.shape[1] > len(keys):  # the others are in the cache
            keys = [""] * (weights.shape[1] - len(keys)) + keys
        label(axes, keys, self.words())
        axes.set_title(f"layer {layer}, head {head}: who reads whom")
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        figure.colorbar(image, ax=axes, shrink=0.7)
        return figure

    @torch.no_grad()
    def lens(self) -> "Figure":
        """The logit lens: the likeliest next token if the model ended after each layer, and how likely."""
        layers, tokens = len(self.trace.f.layers), self.words()
        chances = torch.stack(
            [self.trace.lens(i)[self.row].float().softmax(-1).cpu() for i in range(layers + 1)]
        )
        p, ids = chances.max(-1)  # (L + 1, T)
        figure = new_figure(0.62 * len(tokens) + 2, 0.34 * layers + 1.8)
        axes = figure.add_subplot()
        image = axes.imshow(p.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
        rows = ["embeddings", *(f"layer {i}" for i in range(layers))]
        label(axes, tokens, rows)
        if len(tokens) <= LABELS:
            for i, row in enumerate(ids.tolist()):
                for t, id in enumerate(row):
                    colour = "white" if p[i, t] > 0.55 else "black"
                    text = visible(word(self.tokenizer, id))[:9]
                    axes.text(t, i, text, ha="center", va="center", fontsize=7, color=colour)
        axes.set_title("the next token after each layer (logit lens)")
        figure.colorbar(image, ax=axes, shrink=0.7, label="probability")
        return figure

    @torch.no_grad()
    def norms(self) -> "Figure":
        """The length of the residual stream at each token, after each layer: the first token of a trained
        model often is far longer than the others."""
        names = ["embeddings", *(f"layers.{i}.out" for i in self.trace.f.layers)]
        lengths = torch.stack([self.length(self.trace[name]) for name in names])  # (L + 1, T)
        figure = new_figure(6.5, 4)
        axes = figure.add_subplot()
        axes.plot(lengths[:, 0].numpy(), marker="o", label="first token")
        if lengths.shape[1] > 1:
            others = lengths[:, 1:]
            axes.plot(others.median(1).values.numpy(), marker="o", label="others, median")
            low, high = others.amin(1).numpy(), others.amax(1).numpy()
            axes.fill_between(range(len(names)), low, high, alpha=0.2, label="others")
        axes.set_yscale("log")
        axes.set_xticks(range(len(names)), ["embeddings", *map(str, self.trace.f.layers)])
        axes.set_xlabel("after layer")
        axes.set_ylabel("length of the residual stream")
        axes.legend()
        return figure

    def length(self, value: Tensor) -> Tensor:
        return value[self.row].float().norm(dim=-1).cpu()

    def words(self) -> list[str]:
        return [visible(word(self.tokenizer, id)) for id in self.trace.ids[self.row].tolist()]


def visible(text: str) -> str:
    """A token as a label: white space is seen, and matplotlib reads no formula into a dollar sign."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "␀"
    return shown.replace("$", r"\$")


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, within reason. ImportError, with what to do, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install '.[plot]' in a checkout") from None
    figure = Figure((min(width, 24), min(height, 24)), layout="constrained")
    figure._repr_png_ = partial(as_png, figure)  # a notebook knows figures only after `%matplotlib inline`
    return figure


def as_png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


def label(axes: Any, columns: list[str], rows: list[str]) -> None:
    """Tokens at the axes, as far as they can be read."""
    if len(columns) <= LABELS:
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    if len(rows) <= LABELS:
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
