"""Two checkpoints tensor by tensor; one checkpoint, here and in Transformers, on a prompt.

Both read a tensor when it is its turn: no more than two tensors, or one model, are in memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decoders import compare, model_class, weights
from decoders.formats.config import FAMILIES, family, modern, read_config
from decoders.formats.folder import find
from decoders.formats.names import grouped

from . import ports
from .formula import Arithmetic, Formula, place
from .kit import DTYPES, spread

# ---- Two folders -------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    name: str
    relation: str  # "" if equal; what the second is of the first
    same: bool  # the same numbers, in another precision or place


@dataclass
class Twins:
    """What two checkpoints have in common. `equal`: the same model, if perhaps rounded."""

    first: str
    second: str
    pairs: list[Pair]
    fields: list[str] = field(default_factory=list)  # of config.json

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
        told = [counted([pair for pair in other if not pair.same])] if any(not p.same for p in other) else []
        return f"{self.second} is not {self.first}: {'; '.join(self.fields + told)}."

    def as_json(self) -> dict:
        return {
            "equal": self.equal,
            "sentence": self.sentence,
            "config": self.fields,
            "tensors": [pair._asdict() for pair in self.pairs],
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
        return "\n".join(lines)


def counted(pairs: list[Pair]) -> str:
    """Example: 24 of them transposed, 2 missing in the second"""
    found: dict[str, int] = {}
    for pair in pairs:
        found[pair.relation] = found.get(pair.relation, 0) + 1
    return ", ".join(f"{n} tensor{'s are' if n > 1 else ' is'} {what}" for what, n in found.items())


def apart(first: str | Path, second: str | Path) -> Twins:
    """How the second checkpoint differs from the first, tensor by tensor. ValueError where they are not of
    one family, or one is broken."""
    folders = [find(first), find(second)]
    configs = [modern(read_config(folder)) for folder in folders]
    kinds = [family(config) for config in configs]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{first} is {kinds[0]}, {second} is {kinds[1]}: they have nothing in common")
    a, b = (weights.tensors(folder) for folder in folders)
    config = model_class({"model_type": kinds[0]}).config_class.from_dict(configs[0])
    f = Formula(config, {})
    pairs, done = [], set()
    tied = {f"{f.parts['head']}.weight": f"{f.parts['table']}.weight"}
    for name in a:
        if name in b:
            pairs.append(Pair(name, *relation(a[name], b[name], f, name)))
        elif name in tied and tied[name] in b and torch.equal(a[name], b[tied[name]].to(a[name].dtype)):
            pairs.append(Pair(name, "stored once, tied to the token table", True))
        elif (joint := rejoined(name, b, f)) is not None:
            parts, whole = joint
            told, same = relation(a[name], whole, f, name)
            done.update(parts)
            pairs.append(Pair(name, f"cut into {len(parts)}" + (f", {told}" if told else ""), same))
        else:
            pairs.append(Pair(name, "missing in the second", False))
    for name in b:
        if name not in a and name not in done:
            if name in tied and tied[name] in a and torch.equal(b[name], a[tied[name]].to(b[name].dtype)):
                pairs.append(Pair(name, "stored twice, equal to the token table", True))
            else:
                pairs.append(Pair(name, "in the second only", False))
    return Twins(str(first), str(second), pairs, other_fields(*configs, config))


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
    """The parts that another file has in the place of a joint matrix: q, k and v, or gate and up."""
    qkv = ("q_proj", "k_proj", "v_proj")
    for joint, apart in (
        ("query_key_value", qkv),
        ("qkv_proj", qkv),
        ("c_attn", qkv),
        ("gate_up_proj", ("gate_proj", "up_proj")),
    ):
        names = [name.replace(joint, part) for part in apart]
        if joint in name and all(part in b for part in names):
            whole = torch.cat([b[part] for part in names], dim=0)
            if joint == "query_key_value":  # ours are cut head by head
                heads = torch.stack(whole.chunk(3)).unflatten(1, (f.H, -1))
                whole = heads.transpose(0, 1).reshape(whole.shape)
            return names, whole
    return None


def relation(a: Tensor, b: Tensor, f: Formula, name: str) -> tuple[str, bool]:
    """What b is of a, and whether it is the same model."""
    if a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b):
        return "", True
    told = f", {str(b.dtype).removeprefix('torch.')} instead of {str(a.dtype).removeprefix('torch.')}"
    told = told if a.dtype != b.dtype else ""
    x, y = a, b
    if a.dtype != b.dtype:  # in the coarser of both, so that a rounded copy is equal
        coarse = min(a.dtype, b.dtype, key=lambda d: (d.itemsize, d == torch.float16))
        x, y = a.to(coarse), b.to(coarse)
    if x.shape == y.shape and torch.equal(x, y):
        return f"the same{told}", True
    for what, moved in moves(x, f, name):
        if moved.shape == y.shape and torch.equal(moved, y):
            return what + told, False
    if x.shape != y.shape:
        if x.shape[1:] == y.shape[1:] and torch.equal(x[: len(y)], y[: len(x)]):
            return f"{len(y)} rows long instead of {len(x)}, equal where both have rows{told}", False
        return f"{tuple(y.shape)} instead of {tuple(x.shape)}{told}", False
    return compared(x.float(), y.float()) + told, False


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
    joint = f.parts.get("joint", "-") in name and f.H == f.K
    across = f.family == "openai-gpt" and x.dim() == 2 and joint  # stored (in, out)
    if joint and (x.shape[-1] if across else n) == 3 * f.H * f.D:
        z = x.t() if across else x
        turns = z.unflatten(0, (f.H, 3, f.D)).transpose(0, 1).reshape(z.shape)
        thirds = z.unflatten(0, (3, f.H, f.D)).transpose(0, 1).reshape(z.shape)
        ours, other = ("head by head", "in thirds")[:: 1 if "q_norm" in f.parts else -1]
        for moved in (turns, thirds):
            yield f"joint q, k, v {other} instead of {ours}", moved.t() if across else moved
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


# ---- One folder, here and there ----------------------------------------------------------------------------


class Lowered(Mapping):
    """Weights in another precision, made when they are asked for."""

    def __init__(self, stored: Mapping[str, Tensor], dtype: torch.dtype):
        self.stored, self.dtype = stored, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def documented(name: str) -> bool:
    """Stages that every model of the hub gives out by itself."""
    return name in ("embeddings", "norm", "logits") or name.endswith((".out", ".weights"))


def on_prompt(
    path_or_id: str | Path,
    ids: list[int],
    dtype: str = "float32",
    sequential: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> "compare.Report":
    """The installed Transformers' class against ours on real weights, both against the formula in float64.

    The formula reads a layer at a time; with `sequential` only one of the two models is in memory. Units are
    what the formula in `dtype` is off. Which mistake it is gets tried for up to 50 million weights.
    """
    if dtype not in DTYPES[1:]:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES[1:])}, not {dtype!r}")
    folder = find(path_or_id)
    stored = modern(read_config(folder))
    name = FAMILIES[family(stored)][1]
    config = model_class({**stored, "architectures": [name]}).config_class.from_dict(stored)
    found, inputs = weights.tensors(folder), {"input_ids": torch.tensor([ids])}
    say("the formula in float64 ...")
    exact = read_off(config, Lowered(found, torch.float64), inputs, Arithmetic())
    say(f"its noise in {dtype} ...")
    noise = {name: torch.zeros(len(DTYPES), 2, dtype=torch.float64) for name in exact}
    row = DTYPES.index(dtype)
    for do in (Arithmetic(1), Arithmetic(2), Arithmetic(stepwise=True)):
        values = read_off(config, Lowered(found, getattr(torch, dtype)), inputs, do)
        for stage, value in values.items():
            size = exact[stage][~exact[stage].isnan()].abs()
            eps = torch.finfo(getattr(torch, dtype)).eps
            least = torch.stack([size.max() * eps / 2, size.square().mean().sqrt() * eps / 4])
            most = torch.maximum(torch.tensor(spread(exact[stage], value), dtype=torch.float64), least)
            noise[stage][row] = torch.maximum(noise[stage][row], most)
    kit = SimpleNamespace(
        folder=folder,
        class_name=name,
        config=config,
        family=config.model_type,
        expected={"prompt": exact},
        noise={"prompt": noise},
        inputs={"prompt": inputs},
        weights=found,
        wide=Lowered(found, torch.float64),
    )
    kit.unit = lambda case, stage, dtype: tuple(noise[stage][DTYPES.index(dtype)].tolist())
    got = ports.Got("", dtype)
    ours = model_class({**stored, "architectures": [name]})
    builders = (
        lambda: weights.load(ours, folder, dtype=getattr(torch, dtype)),
        lambda: ports.transformers_port(kit, got),
    )
    values = []
    held = [] if sequential else [build() for build in builders]
    for i, who in enumerate(("decoders", "transformers")):
        say(f"{who} in {dtype} ...")
        model = builders[i]() if sequential else held[i]
        values.append(outputs(model, inputs["input_ids"], len(Formula(config, {}).layers), exact, who))
        del model
    rows, beyond = [], []
    for stage in sorted(exact, key=place):
        if stage in values[1]:
            here = compare.measured(kit, "prompt", stage, values[0][stage], dtype).units
            beyond += [stage] if here > compare.BEYOND else []
            rows.append(
                compare.measured(
                    kit, "prompt", stage, values[1][stage], dtype, f"ours {compare.human(here)}x"
                )
            )
    report = compare.Report(str(path_or_id), got.name, dtype, compare.marked(rows))
    if beyond:
        report.remarks.append(f"Ours is beyond the noise too, from {beyond[0]} on: please report it.")
    if report.first is not None:
        first = report.first
        if sum(t.numel() for t in found.values()) <= 50_000_000:
            kit.weights = dict(Lowered(found, torch.float32))
            kit.wide = dict(Lowered(found, torch.float64))
            report.findings = compare.named(kit, {"prompt": values[1]}, report.rows, dtype)
        if not report.findings:
            tolerance = compare.BEYOND * kit.unit("prompt", first.stage, dtype)[0]
            report.likeness = compare.likeness(
                exact[first.stage], values[1][first.stage], tolerance, first.stage, inputs
            )
    return report


def read_off(config: Any, own: Mapping[str, Tensor], inputs: dict, do: Arithmetic) -> dict[str, Tensor]:
    """What `documented` names, nothing else is kept."""
    found: dict[str, Tensor] = {}

    def hear(name: str, value: Tensor) -> Tensor:
        if documented(name):
            found[name] = value.double()
        return value

    with torch.no_grad():
        Formula(config, own, do, hear).forward(inputs)
    return found


def outputs(model: Any, ids: Tensor, layers: int, exact: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    """Stages out of the documented outputs: hidden states, attentions, logits."""
    with torch.no_grad(), ports.theirs_to_blame(f"{who} failed"):
        output = model(input_ids=ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    states = [t.double() for t in output.hidden_states]
    found = {"embeddings": states[0], "logits": output.logits.double()}
    attentions = enumerate(output.attentions or ())
    found |= {f"layers.{i}.weights": w.double() for i, w in attentions if w is not None}
    found |= {f"layers.{i}.out": states[i + 1] for i in range(layers - 1)}
    found["norm" if "norm" in exact else f"layers.{layers - 1}.out"] = states[layers]
    return {name: t for name, t in found.items() if name in exact and t.shape == exact[name].shape}
