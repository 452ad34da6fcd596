"""Two packagings of one model: how far one is from the other, and whether it was made from it.

The step of a format is the distance of two neighbouring numbers that it can hold. Rounding to the nearest is
off by 0.29 steps on average (root mean square) and by half a step at most; methods that make up for an error
elsewhere, as GPTQ and AWQ do, are off by more, but by about one. What is farther off is another matrix.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from decoders import model_class, weights
from decoders.formats import FAMILIES, Packed, family, find, no_number, read_config

ROUNDED, MADE_FROM = 0.4, 1.2  # root mean square, in steps
BLOCK = 32  # numbers of a row among which a step is looked for


class Rounding(NamedTuple):
    """What a matrix lost. Relative errors are root mean squares: of all, and of the row that is worst off."""

    relative: float
    worst: float
    row: int
    steps: float  # root mean square, in steps of the format
    most_steps: float
    kind: str

    @property
    def made_from(self) -> bool:
        return self.steps <= MADE_FROM

    def __str__(self) -> str:
        if not self.made_from:
            return f"another matrix, in {self.kind}"
        return f"{'rounded' if self.steps <= ROUNDED else 'fitted'} to {self.kind}"

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "made_from": self.made_from}


def rounding(a: Tensor, b: Tensor, first: Tensor | Packed, second: Tensor | Packed) -> Rounding | None:
    """How `b` differs from `a`, plain matrices of one shape, where one of them is packed: `first` and
    `second` are what is stored. None where neither is; of two the one of fewer bytes is the coarser."""
    pairs = (first, a), (second, b)
    packed = [(t, w) for t, w in pairs if isinstance(t, Packed) and "LoRA" not in t.kind]
    if not packed or a.dim() != 2 or a.shape != b.shape:
        return None
    stored, coarse = min(packed, key=lambda pair: pair[0].nbytes)
    x, difference = a.float(), b.float() - a.float()
    sizes = x.square().mean(1).sqrt()
    errors = difference.square().mean(1).sqrt()
    rows = errors / sizes.clamp(min=1e-30)
    in_steps = difference / step_of(coarse, stored.kind)
    row = int(rows.argmax())
    steps, most = in_steps.square().mean().sqrt().item(), in_steps.abs().max().item()
    return Rounding(relative_error(a, b), rows[row].item(), row, steps, most, stored.kind)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, in that of `a`; NaN where a number is."""
    x, difference = a.float(), b.float() - a.float()
    return (difference.square().mean().sqrt() / x.square().mean().sqrt().clamp(min=1e-30)).item()


def step_of(w: Tensor, kind: str) -> Tensor:
    """(out, in): of floats of 8 bits the distance to the next, else the least distance of two different
    numbers of a block."""
    w = w.float()
    if "float8" in kind or kind == "fp8":
        mantissa = 2 if "e5m2" in kind else 3
        least = w.abs().amax(1, keepdim=True).clamp(min=1e-30) * 2**-14
        return torch.exp2(torch.floor(torch.log2(torch.maximum(w.abs(), least))) - mantissa)
    block = block_of(kind, w.shape[1])
    blocks = F.pad(w, (0, -w.shape[1] % block), value=torch.inf).unflatten(1, (-1, block))
    gaps = blocks.sort(-1).values.diff(dim=-1)
    gaps = torch.where((gaps > 0) & gaps.isfinite(), gaps, torch.inf).amin(-1)
    size = w.abs().amax().clamp(min=1e-30)
    gaps = torch.where(gaps.isfinite(), gaps, size)  # a block of one number
    return gaps.repeat_interleave(block, 1)[:, : w.shape[1]]


def block_of(kind: str, inputs: int) -> int:
    """Numbers of a row that surely share a scale, as far as the name says."""
    if group := re.search(r"by groups of (\d+)", kind):
        return int(group[1])
    return inputs if "int8" in kind else BLOCK


@torch.no_grad()
def perplexity(path: str | Path, ids: list[int]) -> float:
    """Of a text of two tokens at least, in float32."""
    config = read_config(find(path))
    kind = family(config)
    text_class = model_class({"model_type": kind, "architectures": [FAMILIES[kind][1]]})
    model = weights.load(text_class, path, dtype=torch.float32)
    tokens = torch.tensor([ids])
    return float(model(tokens, labels=tokens).loss.double().exp())


def table(roundings: dict[str, Rounding]) -> list[str]:
    """A line a kind of matrix: error in all layers, the layer and the row that are worst off."""
    groups: dict[str, list[tuple[str, Rounding]]] = {}
    for name, one in roundings.items():
        groups.setdefault(no_number(name), []).append((name, one))
    width = max(len(kind) for kind in groups)
    lines = [f"{'matrix':<{width}}  {'error':>8}  {'steps':>6}  {'most':>6}  worst layer, worst row"]
    for kind, members in groups.items():
        mean = (sum(one.relative**2 for _, one in members) / len(members)) ** 0.5
        steps = (sum(one.steps**2 for _, one in members) / len(members)) ** 0.5
        most = max(one.most_steps for _, one in members)
        name, worst = max(members, key=lambda pair: pair[1].relative)
        layer = layer_of(name)
        where = f"{f'layer {layer}: ' if layer else ''}{worst.relative:.2%}"
        where += f", row {worst.row}: {worst.worst:.2%}"
        lines.append(f"{kind:<{width}}  {mean:>8.2%}  {steps:>6.2f}  {most:>6.2f}  {where}")
    return lines


def by_layer(roundings: dict[str, Rounding]) -> list[str]:
    """The relative error of each layer's matrices: a line a layer."""
    layers: dict[str, list[str]] = {}
    for name, one in roundings.items():
        if layer := layer_of(name):
            part = name.removesuffix(".weight").rpartition(".")[2]
            layers.setdefault(layer, []).append(f"{part} {one.relative:.2%}")
    return [f"layer {layer:>3}  {', '.join(parts)}" for layer, parts in layers.items()]


def layer_of(name: str) -> str:
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    return found[0] if found else ""
