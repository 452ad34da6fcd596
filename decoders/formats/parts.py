"""What the packagings of a safetensors folder share: the parts of a matrix, numbers in few bits, groups.

A packed matrix lies in a file as several tensors: `o_proj.qweight`, `o_proj.scales` ... A packaging says how
these are called, and what they mean together. All sizes follow from tensors that are there, so that no
file can promise more numbers than it has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .files import forget
from .packed import TABLES, Bits, Packed

CHUNK = 2**19  # numbers that are made at a time
Stored = Iterator[tuple[Path, str, Tensor | Packed]]


@dataclass
class Parts:
    """The tensors of one packed matrix, by what its packaging calls them."""

    file: Path
    module: str  # "model.layers.0.self_attn.o_proj"
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def get(self, part: str) -> Tensor | None:
        return self.tensors.get(part)

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def __getitem__(self, part: str) -> Tensor:
        if part not in self.tensors:
            raise ValueError(f"{self.file}: {self.module} has no {part}")
        return self.tensors[part]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check(self, fits: bool, part: str, why: str) -> None:
        """ValueError that names file and key, unless `fits`."""
        if not fits:
            shape = tuple(self[part].shape)
            name = str(self[part].dtype).removeprefix("torch.")
            raise ValueError(f"{self.file}: {self.module}.{part}, {name} of {shape}, {why}")

    def packed(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kind: str,
        read: Callable[[torch.dtype], Tensor],
        bits: Callable[[], Bits | None] | None = None,
    ) -> Packed:
        """A matrix of `dtype`: `read(to)` gives its numbers, converted; `bits()` whole numbers, or None."""

        def numbers(to: torch.dtype) -> Tensor:
            w = read(to)
            self.forget()
            return w

        def stored_bits() -> Bits | None:
            found = bits() if bits else None
            self.forget()
            return found

        return Packed(torch.Size(shape), dtype, kind, self.nbytes, numbers, stored_bits if bits else None)

    def forget(self) -> None:
        """Give the memory of what has been read back to the system."""
        for tensor in self.tensors.values():
            if tensor.nbytes >= 2**20:
                forget(tensor)


def read_parts(
    stored: Stored,
    keys: tuple[str, ...],
    names: tuple[str, ...],
    matrix: Callable[[Parts], Packed],
    dropped: tuple[str, ...] = (),
) -> Stored:
    """(file, name, tensor) of what is stored, the parts of a packed matrix as one lazy tensor.

    A module that has a part of `keys` is packed. Beside it there may be the parts `names`; `matrix` makes of
    them what is then called `MODULE.weight`. Parts that are `dropped` are of no use. Everything else stays.
    ValueError if a part has no key beside it.
    """
    held = {name: (file, tensor) for file, name, tensor in stored}
    found = [(name.removesuffix(f".{key}"), key) for key in keys for name in held if name.endswith(f".{key}")]
    for module, key in found:
        parts = Parts(held[f"{module}.{key}"][0], module)
        for part in (key, *names):
            if f"{module}.{part}" in held:
                parts.tensors[part] = plain_part(*held.pop(f"{module}.{part}"), f"{module}.{part}")
        for part in dropped:
            held.pop(f"{module}.{part}", None)
        yield parts.file, f"{module}.weight", matrix(parts)
    own = tuple(f".{part}" for part in names if part != "weight")
    for name, (file, tensor) in held.items():
        if own and name.endswith(own):
            raise ValueError(f"{file}: {name} has no {' or '.join(keys)} beside it")
        yield file, name, tensor


def plain_part(file: Path, tensor: Tensor | Packed, name: str) -> Tensor:
    if isinstance(tensor, Packed):
        raise ValueError(f"{file}: {name} is packed in two ways")
    return tensor


# ---- Numbers in few bits -----------------------------------------------------------------------------------


def unpack(words: Tensor, bits: int, count: int | None = None) -> Tensor:
    """(..., n) uint8: numbers of 1 to 8 bits out of the last dimension of (..., words), lowest bits first.

    The words are one stream of bits: a number may begin in one byte and end in the next. `count` cuts off
    what fills up the last word.
    """
    stream = words.contiguous().view(torch.uint8)
    stream = F.pad(stream, (0, -stream.shape[-1] % bits))
    stream = stream.unflatten(-1, (-1, bits))  # 8 numbers in as many bytes as each has bits
    numbers = []
    for i in range(8):
        byte, offset = divmod(bits * i, 8)
        number = stream[..., byte] >> offset
        if offset + bits > 8:
            number = number | stream[..., byte + 1] << (8 - offset)
        numbers.append(number & (2**bits - 1))
    return torch.stack(numbers, -1).flatten(-2)[..., :count]


def grouped(numbers: Tensor, groups: int) -> Tensor:
    """(rows, in) -> (rows, groups, in / groups): those that share a scale."""
    return numbers.unflatten(-1, (groups, -1))


def order_of(index: Tensor, groups: int) -> Tensor | None:
    """(in,): the inputs, group by group. `index` names the group of each. None where some groups have more
    inputs than others, or there is no such group."""
    fits = len(index) > 0 and int(index.min()) >= 0 and int(index.max()) < groups
    if not fits or bool((torch.bincount(index, minlength=groups) * groups != len(index)).any()):
        return None
    return index.argsort(stable=True)


def is_sorted(order: Tensor) -> bool:
    """Whether the inputs lie group by group already."""
    return torch.equal(order, torch.arange(len(order)))


def in_order(words: Tensor, bits: int, inputs: int, order: Tensor) -> Tensor:
    """Numbers of 4 or 8 bits in rows of bytes -> the same with the columns in this order."""
    result = torch.empty(len(words), inputs * bits // 8, dtype=torch.uint8)

    def put(rows: slice) -> Tensor:
        q = unpack(words[rows], bits, inputs)[:, order]
        return in_pairs(q) if bits == 4 else q

    return fill(result, put, inputs)


def in_pairs(q: Tensor) -> Tensor:
    """(rows, in) numbers below 16 -> two a byte, the first in the lower half."""
    return q[:, ::2] | q[:, 1::2] << 4


def fill(result: Tensor, rows_of: Callable[[slice], Tensor], inputs: int) -> Tensor:
    """`result` with what `rows_of` gives, for a few rows at a time: what leads to them stays in the cache,
    and there is never more of it in memory."""
    step = max(1, CHUNK // max(1, inputs))
    for start in range(0, len(result), step):
        rows = slice(start, start + step)
        result[rows] = rows_of(rows)
    return result


def joined_gate_up(stored: Stored) -> Stored:
    """Phi-3's `gate_proj` and `up_proj`, which some tools cut apart, as the fused matrix of the hub's names:
    the gate's rows, then up's."""
    halves: dict[str, dict[str, tuple[Path, Tensor | Packed]]] = {}
    for file, name, tensor in stored:
        half = next((part for part in ("gate_proj", "up_proj") if f".mlp.{part}." in name), None)
        if half is None:
            yield file, name, tensor
            continue
        fused = name.replace(half, "gate_up_proj")
        both = halves.setdefault(fused, {})
        both[half] = file, tensor
        if len(both) == 2:
            yield file, fused, joined(both["gate_proj"][1], both["up_proj"][1])
            del halves[fused]
    for fused, (half, *_) in halves.items():
        file = halves[fused][half][0]
        raise ValueError(f"{file} has the {half} of {fused} only")


def joined_bits(first: Bits, second: Bits) -> Bits | None:
    """The rows of both; None where one has what the other has not, or another order of its inputs."""
    tables: dict[str, Any] = {}
    for name in TABLES:
        a, b = getattr(first, name), getattr(second, name)
        if (a is None) != (b is None) or (a is not None and a.shape[1:] != b.shape[1:]):
            return None
        tables[name] = None if a is None else torch.cat([a, b])
    order, other = first.order, second.order
    if (order is None) != (other is None):
        return None
    if order is not None and other is not None and not torch.equal(order, other):
        return None
    return first._replace(**tables)


def joined(first: Tensor | Packed, second: Tensor | Packed) -> Tensor | Packed:
    """The rows of one, then those of the other."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if not isinstance(first, Packed) or not isinstance(second, Packed):
        raise ValueError("gate_proj and up_proj are packed in different ways")
    shape = torch.Size([first.shape[0] + second.shape[0], *first.shape[1:]])

    def read(dtype: torch.dtype) -> Tensor:
        return torch.cat([first.dequantize(dtype), second.dequantize(dtype)])

    def bits() -> Bits | None:
        halves: list[Any] = [part.bits() for part in (first, second) if part.bits]
        return None if None in halves else joined_bits(*halves)

    both = bits if first.bits and second.bits else None
    return Packed(shape, first.dtype, first.kind, first.nbytes + second.nbytes, read, both)
