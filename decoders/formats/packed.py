"""A tensor that a file holds in fewer bits than its numbers have: dequantised when it is used."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Bits(NamedTuple):
    """A matrix as whole numbers, with a scale for each group of inputs: w = (q - zero) * scale, or with a
    float `minimum` w = q * scale + minimum. Column k is that of input order[k]."""

    # (out, in) int8; or (out, in / 2) uint8, numbers from 0 to 15 in pairs, the first in the lower half, with
    # a zero or a minimum
    q: Tensor
    scale: Tensor  # (out, groups)
    zero: Tensor | None = None  # (out, groups) whole numbers, of int8 perhaps None
    minimum: Tensor | None = None  # (out, groups)
    order: Tensor | None = None  # (in,), where inputs of a group are scattered


TABLES = Bits._fields[:-1]  # all but the order, which is of columns: what has rows


@dataclass(frozen=True)
class Packed:
    """`shape` and `dtype` are those of the numbers that `dequantize` gives. Nothing is read before."""

    shape: torch.Size
    dtype: torch.dtype
    kind: str  # its format, for people: "Q4_K", "nf4", "int4 by groups of 128"
    nbytes: int  # in the file, scales included
    read: Callable[[torch.dtype], Tensor]  # the numbers in a dtype
    # the same as whole numbers, where the format is made of such; None where just this tensor is not
    bits: Callable[[], Bits | None] | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain numbers, in the packaging's own dtype or converted to `dtype`."""
        return self.read(dtype or self.dtype)


def unpacked(tensor: Tensor | Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers of a tensor, whether it is packed or not."""
    if isinstance(tensor, Packed):
        return tensor.dequantize(dtype)
    return tensor if dtype is None else tensor.to(dtype)


def as_dtype(tensor: Tensor | Packed, dtype: torch.dtype) -> Packed:
    """The tensor in `dtype`, converted when it is used."""
    kind = tensor.kind if isinstance(tensor, Packed) else str(tensor.dtype).removeprefix("torch.")
    return Packed(tensor.shape, dtype, kind, tensor.nbytes, lambda wanted: unpacked(tensor, dtype).to(wanted))


def named_parts(
    tensor: Tensor | Packed, modern: Callable[[Tensor], Iterable[tuple[str, Tensor]]]
) -> list[tuple[str, Tensor | Packed]]:
    """`modern(tensor)`, which names a tensor and may cut it into parts. Of a packed one it is asked about
    names and shapes only, on the meta device; the parts are cut when they are used."""
    if not isinstance(tensor, Packed):
        return list(modern(tensor))
    parts = list(modern(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")))
    if len(parts) == 1 and parts[0][1].shape == tensor.shape:
        return [(parts[0][0], tensor)]
    return [(name, part_of(tensor, i, part.shape, modern)) for i, (name, part) in enumerate(parts)]


def part_of(whole: Packed, i: int, shape: torch.Size, modern: Callable) -> Packed:
    """The i-th of the parts into which `modern` cuts the dequantised matrix."""
    share = whole.nbytes * shape.numel() // max(1, whole.shape.numel())

    def read(dtype: torch.dtype) -> Tensor:
        return list(modern(whole.dequantize(dtype)))[i][1]

    whole_bits = whole.bits
    if whole_bits is None:
        return Packed(shape, whole.dtype, whole.kind, share, read)

    def bits() -> Bits | None:  # every layout cuts by rows, which scales and zeros have too
        found = whole_bits()
        if found is None:
            return None
        tables: dict[str, Any] = {name: getattr(found, name) for name in TABLES}
        parts: dict[str, Any] = {
            name: t if t is None else list(modern(t))[i][1] for name, t in tables.items()
        }
        return found._replace(**parts)

    return Packed(shape, whole.dtype, whole.kind, share, read, bits)
