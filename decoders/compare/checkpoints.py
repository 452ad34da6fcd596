"""Two checkpoints, tensor by tensor: no more than two tensors are in memory."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decoders import model_class, weights
from decoders.formats import family, find, grouped, modern, read_config

from . import packings
from .formula import Formula
from .packings import Rounding


class Pair(NamedTuple):
    name: str
    relation: str  # "" if equal; what the second is of the first
    same: bool  # the same numbers, in another precision or place, or made from them
    rounding: Rounding | None = None  # what a packaging of fewer bits has cost


@dataclass
class Twins:
    """What two checkpoints have in common. `equal`: the same model, if perhaps rounded, or packed."""

    first: str
    second: str
    pairs: list[Pair]
    fields: list[str] = field(default_factory=list)  # of config.json
    perplexity: tuple[float, float] | None = None  # on a text, of each

    @property
    def equal(self) -> bool:
        return not self.fields and all(pair.same for pair in self.pairs)

    @property
    def sentence(self) -> str:
        other = [pair for pair in self.pairs if pair.relation]
        if not other and not self.fields:
            return f"{self.second} is {self.first}: all {len(self.pairs)} tensors are equal, bit by bit."
        if self.equal:
            return f"{self.second} is {self.first}, stored otherwise: {counted(other)}."
        message = (
            [counted([pair for pair in other if not pair.same])] if any(not p.same for p in other) else []
        )
        if witness := next((pair for pair in other if not pair.same), None):
            message.append(f"{witness.name} says so")
        return f"{self.second} is not {self.first}: {'; '.join(self.fields + message)}."

    @property
    def roundings(self) -> dict[str, Rounding]:
        return {pair.name: pair.rounding for pair in self.pairs if pair.rounding is not None}

    def as_json(self) -> dict:
        return {
            "equal": self.equal,
            "sentence": self.sentence,
            "config": self.fields,
            "tensors": [
                {**pair._asdict(), "rounding": pair.rounding and pair.rounding.as_json()}
                for pair in self.pairs
            ],
            "perplexity": self.perplexity,
        }

    def __str__(self) -> str:
        lines = [self.sentence, ""]
        groups: dict[str, list[str]] = {}
        for pair in self.pairs:
            groups.setdefault(pair.relation or "equal", []).append(pair.name)
        for relation, names in groups.items():
            lines.append(f"{len(names):5} {relation}")
            if relation != "equal":
                lines.append(f"      {grouped(names)}")
        if roundings := self.roundings:
            lines += ["", *packings.table(roundings), "", *packings.by_layer(roundings)]
        if self.perplexity:
            lines += ["", "perplexity {:.4f} of the first, {:.4f} of the second".format(*self.perplexity)]
        return "\n".join(lines)


def counted(pairs: list[Pair]) -> str:
    """Example: 24 of them transposed, 2 missing in the second"""
    found: dict[str, int] = {}
    for pair in pairs:
        found[pair.relation] = found.get(pair.relation, 0) + 1
    return ", ".join(f"{n} tensor{'s are' if n > 1 else ' is'} {what}" for what, n in found.items())


def apart(first: str | Path, second: str | Path, tolerance: float | None = None) -> Twins:
    """How the second checkpoint differs from the first, tensor by tensor.

    A matrix that one of the two packs into fewer bits is the same if it can have been made from the other's:
    see `packings.py`. With a `tolerance` any tensor is that differs by no more of its size (root mean
    squares). ValueError where they are not of one family, or one is broken.
    """
    folders = [find(first), find(second)]
    configs = [modern(read_config(folder)) for folder in folders]
    kinds = [family(config) for config in configs]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{first} is {kinds[0]}, {second} is {kinds[1]}: they have nothing in common")
    a, b = (weights.tensors(folder) for folder in folders)
    config = model_class({"model_type": kinds[0]}).config_class.from_dict(configs[0])
    f = Formula(config, {})
    pairs, done = [], set()
    tied = {f"{f.parts['head']}.weight": f"{f.parts['embedding']}.weight"}
    for name in a:
        if name in b:
            pairs.append(pair_of(name, a, b, f, tolerance))
        elif name in tied and tied[name] in b and torch.equal(a[name], b[tied[name]].to(a[name].dtype)):
            pairs.append(Pair(name, "stored once, tied to the token table", True))
        elif (fused := rejoined(name, b, f)) is not None:
            parts, whole = fused
            message, same = relation(a[name], whole, f, name)
            done.update(parts)
            pairs.append(Pair(name, f"cut into {len(parts)}" + (f", {message}" if message else ""), same))
        else:
            pairs.append(Pair(name, "missing in the second", False))
    for name in b:
        if name not in a and name not in done:
            if name in tied and tied[name] in a and torch.equal(b[name], a[tied[name]].to(b[name].dtype)):
                pairs.append(Pair(name, "stored twice, equal to the token table", True))
            else:
                pairs.append(Pair(name, "in the second only", False))
    return Twins(str(first), str(second), pairs, other_fields(*configs, config))


def pair_of(name: str, a: weights.Tensors, b: weights.Tensors, f: Formula, tolerance: float | None) -> Pair:
    """Of a tensor that both have. What people do to tensors is looked for before what a format does."""
    x, y = a[name], b[name]
    message, same = relation(x, y, f, name)
    if same or x.shape != y.shape:
        return Pair(name, message, same)
    finite = bool(x.isfinite().all() and y.isfinite().all())
    lost = packings.rounding(x, y, a.stored[name], b.stored[name]) if finite else None
    if tolerance is not None:
        fits = packings.relative_error(x, y) <= tolerance
        reason = f"{lost or 'another'}, {'within' if fits else 'beyond'} a tolerance of {tolerance:.2%}"
        return Pair(name, reason, fits, lost)
    if lost is None or not message.startswith("another"):
        return Pair(name, message, same)
    return Pair(name, str(lost), lost.made_from, lost)


STORAGE = ("text_config", "tie_word_embeddings")  # what the tensors themselves say


def other_fields(a: dict, b: dict, config: Any) -> list[str]:
    """Fields that decide numbers and differ; defaults filled in."""
    own = [type(config).from_dict(d).to_dict() for d in (a, b)]
    flat = [{**d, **(d.get("text_config") or {})} for d in own]
    return [
        f"{key} is {flat[0].get(key)!r} in the first and {flat[1].get(key)!r} in the second"
        for key in flat[0]
        if key not in STORAGE and flat[0].get(key) != flat[1].get(key)
    ]


def rejoined(name: str, b: Mapping[str, Tensor], f: Formula) -> tuple[list[str], Tensor] | None:
    """The parts that another file has in the place of a fused matrix: q, k and v, or gate and up."""
    qkv = ("q_proj", "k_proj", "v_proj")
    for fused, apart in (
        ("query_key_value", qkv),
        ("qkv_proj", qkv),
        ("c_attn", qkv),
        ("gate_up_proj", ("gate_proj", "up_proj")),
    ):
        names = [name.replace(fused, part) for part in apart]
        if fused in name and all(part in b for part in names):
            whole = torch.cat([b[part] for part in names], dim=0)
            if fused == "query_key_value":  # ours are cut head by head
                heads = torch.stack(whole.chunk(3)).unflatten(1, (f.H, -1))
                whole = heads.transpose(0, 1).reshape(whole.shape)
            return names, whole
    return None


def relation(a: Tensor, b: Tensor, f: Formula, name: str) -> tuple[str, bool]:
    """What b is of a, and whether it is the same model."""
    if a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b):
        return "", True
    message = f", {str(b.dtype).removeprefix('torch.')} instead of {str(a.dtype).removeprefix('torch.')}"
    message = message if a.dtype != b.dtype else ""
    x, y = a, b
    if a.dtype != b.dtype:  # in the coarser of both, so that a rounded copy is equal
        coarse = min(a.dtype, b.dtype, key=lambda d: (d.itemsize, d == torch.float16))
        x, y = a.to(coarse), b.to(coarse)
    if x.shape == y.shape and torch.equal(x, y):
        return f"the same{message}", True
    for what, moved in moves(x, f, name):
        if moved.shape == y.shape and torch.equal(moved, y):
            return what + message, False
    if x.shape != y.shape:
        if x.shape[1:] == y.shape[1:] and torch.equal(x[: len(y)], y[: len(x)]):
            return f"{len(y)} rows long instead of {len(x)}, equal where both have rows{message}", False
        return f"{tuple(y.shape)} instead of {tuple(x.shape)}{message}", False
    return compared(x.float(), y.float()) + message, False


def moves(x: Tensor, f: Formula, name: str) -> Iterator[tuple[str, Tensor]]:
    """What people do to tensors."""
    if x.dim() == 2:
        yield "transposed", x.t()
    if x.dim() == 1:
        yield "one more everywhere (norm weights that count from one)", x + 1
        yield "one less everywhere (norm weights that count from one)", x - 1
    n = len(x)
    if n % 2 == 0:
        yield "with its halves swapped", torch.cat([x[n // 2 :], x[: n // 2]])
        yield "with rows of its halves in turns", torch.stack(x.chunk(2)).transpose(0, 1).reshape(x.shape)
    fused = f.parts.get("qkv", "-") in name and f.H == f.K
    across = f.family == "openai-gpt" and x.dim() == 2 and fused  # stored (in, out)
    if fused and (x.shape[-1] if across else n) == 3 * f.H * f.D:
        z = x.t() if across else x
        turns = z.unflatten(0, (f.H, 3, f.D)).transpose(0, 1).reshape(z.shape)
        thirds = z.unflatten(0, (3, f.H, f.D)).transpose(0, 1).reshape(z.shape)
        ours, other = ("head by head", "in thirds")[:: 1 if "q_norm" in f.parts else -1]
        for moved in (turns, thirds):
            yield f"fused q, k, v {other} instead of {ours}", moved.t() if across else moved
    if f.R and any(part in name for part in ("q_proj", "k_proj", "query_key_value", "qkv_proj", "layernorm")):
        for what, order in rotations(f):
            if n % f.D == 0:
                yield what, x.unflatten(0, (-1, f.D))[:, order].reshape(x.shape)
                if f.family == "phi3" and "qkv_proj" in name:  # v has no rotation
                    moved = x.unflatten(0, (-1, f.D))[:, order].reshape(x.shape)
                    turned = (f.H + f.K) * f.D
                    yield what, torch.cat([moved[:turned], x[turned:]])
                if "query_key_value" in name:
                    heads = x.unflatten(0, (f.H, 3, f.D)).clone()
                    heads[:, :2] = heads[:, :2][:, :, order]
                    yield what, heads.reshape(x.shape)


def rotations(f: Formula) -> Iterator[tuple[str, Tensor]]:
    """Rows of a head for rotation of neighbours instead of halves, and back."""
    R = f.R // 2 * 2
    rest = torch.arange(R, f.D)
    pairs = torch.cat([torch.stack([torch.arange(R // 2), torch.arange(R // 2, R)], 1).flatten(), rest])
    yield "with rows of each head permuted for a rotation of neighbours", pairs
    yield "with rows of each head permuted back from a rotation of neighbours", pairs.argsort()


def compared(x: Tensor, y: Tensor) -> str:
    """Of one shape, in float32."""
    difference = (y - x).abs().max().item()
    if math.isnan(difference):
        return "NaN in places"
    factor = ((x * y).sum() / x.square().sum().clamp(min=1e-30)).item()
    if factor and (y - factor * x).abs().max() <= 1e-6 * y.abs().max():
        return f"{factor:.6g} times as large"
    if x.dim() == 2 and torch.equal(x[x[:, 0].argsort()], y[y[:, 0].argsort()]):
        return "with its rows in another order"
    typical = (y - x).square().mean().sqrt().item() / x.square().mean().sqrt().clamp(min=1e-30).item()
    return f"another: {typical:.1%} off, {difference:.2g} at most"
