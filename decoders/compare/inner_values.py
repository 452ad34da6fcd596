"""Which inner value of a port is which stage.

Values of a module are caught by hooks and matched to our stages by value, and where none is equal by the
weights that a module holds: the input and output of whatever multiplies by our q matrix are our `attn_in`
and `q`, even if they are wrong. Nobody has to write down which name is which.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from .formula import Formula, stage_order
from .kit import Kit
from .noise import BEYOND, spread

CACHE_NAMES = ("past_key_values", "cache")  # the second in Transformers from 5.24 on


@dataclass
class PortValues:
    """What a port computes: case -> stage -> value."""

    name: str
    dtype: str
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # case -> stage -> value
    seen: dict[tuple[str, str], str] = field(default_factory=dict)  # where in the port
    remarks: list[str] = field(default_factory=list)
    unsteady: bool = False


def as_numbers(value: Any, name: str) -> Tensor:
    """What a port gives under a name (a tensor, an array of NumPy or JAX, a number) as a dense tensor.
    ValueError for what holds no numbers to compare: a meta or sparse tensor, text, None."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{name} is {type(value).__name__}: give numbers, a tensor or an array"
            ) from None
    if value.is_meta:
        raise ValueError(f"{name} is a meta tensor, a shape without numbers: build the port on a real device")
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        raise ValueError(f"{name} is {special(value)}")
    if value.is_complex():
        raise ValueError(f"{name} is complex: give real numbers")
    return value.detach().cpu()


def special(value: Tensor) -> str:
    """What kind of tensor has no plain numbers, and what to do."""
    if value.is_quantized:
        return "a quantized tensor: give the numbers themselves, with .dequantize()"
    if value.is_nested:
        return "a nested tensor: give the numbers themselves, with .to_padded_tensor()"
    return "a sparse tensor: give the numbers themselves, with .to_dense()"


def is_dense(value: Tensor) -> bool:
    return not (value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_nested)


def leaves(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in whatever a port returns; caches are looked at by nobody."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield path, output
    elif hasattr(output, "_asdict"):
        yield from leaves(output._asdict(), path)
    elif isinstance(output, Mapping):
        for name, value in output.items():
            if name not in CACHE_NAMES:
                yield from leaves(value, f"{path}.{name}")
    elif isinstance(output, tuple | list):
        for i, value in enumerate(output):
            yield from leaves(value, f"{path}[{i}]")


class Recorded(NamedTuple):
    name: str
    value: Tensor


class Recorder:
    """Catches what goes into each submodule and what comes out."""

    def __init__(self, module: nn.Module):
        self.caught: list[Recorded] = []
        self.handles = [
            part.register_forward_hook(self.hook(name), with_kwargs=True)
            for name, part in module.named_modules()
            if name
        ]

    def hook(self, name: str) -> Callable:
        def hear(part: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            for i, (path, t) in enumerate(leaves((args, dict(kwargs)))):
                if is_dense(t) and t.numel() <= 10_000_000:
                    self.caught.append(Recorded(f"{name} input{path if i else ''}", t.detach().double()))
            for i, (path, t) in enumerate(leaves(output)):
                if is_dense(t) and t.numel() <= 10_000_000:
                    self.caught.append(Recorded(f"{name}{path if i else ''}", t.detach().double()))

        return hear

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def as_matrix(value: Tensor) -> Tensor:
    """A stage, (B, T, C) or (B, H, T, D), as (B T, features)."""
    if value.dim() == 4:
        value = value.transpose(1, 2)
    return value.reshape(value.shape[0] * value.shape[1], -1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 3:
        return matrix.reshape(shape)
    B, H, T, D = shape
    return matrix.reshape(B, T, H, D).transpose(1, 2)


def matrices(value: Tensor, B: int, T: int) -> Iterator[tuple[tuple, Tensor]]:
    """All ways to read a tensor as (B T, features)."""
    sizes = value.shape
    for b in range(value.dim()):
        for t in range(value.dim()):
            if b != t and sizes[b] == B and sizes[t] == T:
                yield ("axes", b, t), value.movedim((b, t), (0, 1)).reshape(B * T, -1)
    for a in range(value.dim()):
        if sizes[a] == B * T:
            yield ("rows", a), value.movedim(a, 0).reshape(B * T, -1)
    if value.dim() > 2 and sizes[0] % B == 0 and sizes[0] > B:
        for t in range(1, value.dim()):
            if sizes[t] == T:
                yield ("folded", t), value.unflatten(0, (B, -1)).movedim(t + 1, 1).reshape(B * T, -1)


def arranged(value: Tensor, wanted: Tensor) -> Tensor | None:
    """A value that was given under our name, in our shape: also transposed, or with heads cut or joined. Of
    several ways one that agrees. None if its numbers are not as many."""
    if value.numel() != wanted.numel():
        return None
    if value.shape == wanted.shape and value.dim() != 2:
        return value
    if wanted.dim() < 3:
        ways = [value.reshape(wanted.shape)] if value.squeeze().shape == wanted.squeeze().shape else []
        if wanted.dim() == 2 and value.squeeze().shape == wanted.t().shape:
            ways.append(value.squeeze().t())
    else:
        B, T = wanted.shape[0], wanted.shape[-2]
        if wanted.dim() == 3:
            squeezed = value.squeeze().shape == wanted.squeeze().shape
            flat = value.shape == (B * T, wanted.shape[2])
            ways = [value.reshape(wanted.shape)] if squeezed or flat else []
        else:
            ways = [from_matrix(m, wanted.shape) for _, m in matrices(value, B, T)]
            if B == 1:
                ways += [from_matrix(m, wanted.shape) for _, m in matrices(value.squeeze(0)[None], B, T)]
    if not ways:
        return None
    far = [spread(wanted, torch.nan_to_num(way))[1] for way in ways]
    best = far.index(min(far))
    return ways[best if far[best] < 0.01 * far[0] else 0]  # wrong values are no reason for another way


# Of a layer: part -> (stage that goes in, stage that comes out)
ENDS = {"q": ("attn_in", "q"), "k": ("attn_in", "k"), "v": ("attn_in", "v"), "o": ("heads", "attn_out"),
        "up": ("mlp_in", "mlp_up"), "down": ("mlp_act", "mlp_out"), "q_norm": ("q", "q_normed"),
        "k_norm": ("k", "k_normed")}  # fmt: skip


class Matching:
    """Which inner value of a port is which stage."""

    def __init__(self, kit: Kit, port: nn.Module, got: PortValues, caught: dict[str, list[Recorded]]):
        self.kit, self.port, self.got, self.caught = kit, port, got, caught

    def fill(self) -> None:
        """Found in one case, looked up under the same name in the others."""
        known: dict[str, tuple] = {}  # stage -> (name, way to read it, columns or None)
        layers = len(Formula(self.kit.config, {}).layers)
        for case in self.caught:
            exact = {
                name: value
                for name, value in self.kit.expected[case].items()
                if value.dim() > 2 and name not in self.got.values[case]
            }
            for name in sorted(exact, key=stage_order):
                if name not in known and (found := self.by_value(case, name)):
                    known[name] = found
        for name, found in self.by_weights().items():
            known.setdefault(name, found)
        for name, found in list(known.items()):  # what one layer calls so, the others do too
            for other, where in elsewhere(name, found[0], layers):
                known.setdefault(other, (where, *found[1:]))
        for case in self.caught:
            for name, (where, way, columns) in known.items():
                value = self.looked_up(case, name, where, way, columns)
                if value is not None and name not in self.got.values[case]:
                    self.got.values[case][name] = value
                    self.got.seen[case, name] = (
                        where if columns is None else f"{where}, {columns_text(columns)}"
                    )
            self.gradients(case)

    def by_value(self, case: str, name: str) -> tuple | None:
        exact = self.kit.expected[case][name]
        unit = self.kit.unit(case, name, self.got.dtype)
        B, T = exact.shape[0], exact.shape[-2]
        wanted = as_matrix(exact)
        if wanted.isnan().all():
            return None
        rows = ~wanted.isnan().any(1)
        for where, value in self.caught[case]:
            for way, matrix in matrices(value, B, T):
                if matrix.shape[1] < wanted.shape[1] or where.startswith("grad "):
                    continue
                if matrix.shape == wanted.shape and within(spread(wanted, matrix), unit):
                    return where, way, None
                if not rows.any():
                    continue
                columns = matrix[rows].nan_to_num().T
                distance, nearest = torch.cdist(wanted[rows].T, columns, p=float("inf")).min(1)
                if distance.max() <= BEYOND * unit[0] and within(spread(wanted, matrix[:, nearest]), unit):
                    return where, way, nearest
        return None

    def looked_up(
        self, case: str, name: str, where: str, way: tuple, columns: Tensor | None
    ) -> Tensor | None:
        exact = self.kit.expected[case].get(name)
        if exact is None:
            return None
        B, T = exact.shape[0], exact.shape[-2]
        for seen, value in self.caught[case]:
            if seen == where:
                for other, matrix in matrices(value, B, T):
                    if other == way or (way == () and matrix.shape[1] >= as_matrix(exact).shape[1]):
                        if columns is not None and int(columns.max()) >= matrix.shape[1]:
                            continue
                        matrix = matrix if columns is None else matrix[:, columns]
                        if matrix.numel() == exact.numel():
                            return from_matrix(matrix, exact.shape)
        return None

    def by_weights(self) -> dict[str, tuple]:
        """Stages at the ends of the modules that hold our matrices and norms."""
        f, found = Formula(self.kit.config, self.kit.weights64), {}
        ours: list[tuple[str, int | None, Tensor]] = []
        for layer in f.layers:
            for part in f.parts:
                if part in ("embedding", "position_embedding", "layers", "norm", "head", "patches"):
                    continue
                if part == "qkv":
                    weight = f.matrix("qkv", layer)[0]
                    rows = f.split_qkv(torch.arange(len(weight))[None, None].double())
                    ours += [
                        (letter, layer, weight[index.long().flatten()])
                        for letter, index in zip("qkv", rows, strict=True)
                    ]
                elif (weight := f.matrix(part, layer)[0]) is not None:
                    ours.append((part, layer, weight))
        ours += [("norm", None, f.matrix("norm")[0])] if "norm" in f.parts else []
        ours.append(("head", None, f.output_matrix()[0]))
        for name, module in self.port.named_modules():
            held = list(module.parameters(recurse=False))
            if sum(own.dim() > 1 for own in held) > 1 or next(module.children(), None) is not None:
                continue  # it does more than to multiply by one matrix
            for own in held:
                for part, layer, weight in ours:
                    columns = rows_of(weight, own.detach().double())
                    if columns is not None:
                        into, out = self.ends(f, part, layer)
                        whole = len(weight) in own.shape and columns.tolist() == list(range(len(weight)))
                        if out:
                            found.setdefault(out, (name, (), None if whole else columns))
                        if into:
                            found.setdefault(into, (f"{name} input", (), None))
        return found

    def ends(self, f: Formula, part: str, layer: int | None) -> tuple[str, str]:
        if part == "norm":
            return f"layers.{f.layers[-1]}.out", "norm"
        if part == "head":
            return "norm", ""
        before = f"layers.{layer - 1}.out" if layer else "embeddings"
        at = f"layers.{layer}."
        if part == "norm_1":
            return (at + "attn_sum", at + "mlp_in") if f.family == "openai-gpt" else (before, at + "attn_in")
        if part == "norm_2":
            return ("", at + "out") if f.family == "openai-gpt" else (at + "attn_sum", at + "mlp_in")
        into, out = ENDS[part]
        return at + into, at + out

    def gradients(self, case: str) -> None:
        """Of parameters that hold our weights, as they are, transposed, or among others."""
        grads = {seen.name[5:]: seen.value for seen in self.caught[case] if seen.name.startswith("grad ")}
        parameters = dict(self.port.named_parameters())
        for name, weight in self.kit.weights64.items():
            if f"grad.{name}" not in self.kit.expected[case]:
                continue
            for theirs, grad in grads.items():
                own = parameters[theirs].detach().double()
                if own.shape == weight.shape and torch.equal(own, weight):
                    value = grad
                elif own.dim() == 2 and own.t().shape == weight.shape and torch.equal(own.t(), weight):
                    value = grad.t()
                elif (
                    own.dim() == 2
                    and weight.dim() == 2
                    and (rows := rows_of(weight, own)) is not None
                    and (own.shape[1] == weight.shape[1])
                ):
                    value = grad[rows]
                else:
                    continue
                self.got.values[case].setdefault(f"grad.{name}", value)
                self.got.seen[case, f"grad.{name}"] = theirs
                break


def elsewhere(stage: str, where: str, layers: int) -> Iterator[tuple[str, str]]:
    """The same stage of the other layers, and what it would be called there."""
    if stage.startswith("layers."):
        _, i, rest = stage.split(".", 2)
        for n in range(layers):
            if n != int(i) and f".{i}." in where:
                yield f"layers.{n}.{rest}", where.replace(f".{i}.", f".{n}.", 1)


def rows_of(weight: Tensor, theirs: Tensor) -> Tensor | None:
    """Where each row of `weight` stands in a matrix of theirs, stored either way; None if one is missing."""
    if weight.dim() != theirs.dim():
        return None
    if weight.dim() == 1:
        return torch.arange(len(weight)) if torch.equal(weight, theirs) else None
    for matrix in (theirs, theirs.t()):
        if matrix.shape[1] == weight.shape[1] and len(matrix) >= len(weight):
            distance, nearest = torch.cdist(weight, matrix, p=float("inf")).min(1)
            if distance.max() == 0:
                return nearest
    return None


def within(difference: tuple[float, float], unit: tuple[float, float]) -> bool:
    return difference[0] <= BEYOND * unit[0] and difference[1] <= BEYOND * unit[1]


def columns_text(columns: Tensor) -> str:
    """Example: columns 48-95, or: columns in another order"""
    first = int(columns[0])
    if columns.tolist() == list(range(first, first + len(columns))):
        return f"columns {first}-{first + len(columns) - 1}"
    return "columns in another order"
