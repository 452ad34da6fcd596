"""Writing a GGUF file: header, then tensor after tensor, each made when its turn comes.

    write_file(path, lambda out: write_gguf(out, metadata, entries))

Q8_0 and Q4_0 are made as llama.cpp makes them, bit for bit.
"""

import struct
from collections.abc import Callable
from math import prod
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .gguf import ARRAY, KINDS, MAGIC, SCALARS, STRING, VERSIONS, Kind
from .gguf_blocks import CHUNK, PLAIN

ALIGNMENT = 32
TYPE_OF = {bool: 7, float: 6, int: 4}  # as float32 and uint32


class Entry(NamedTuple):
    """A tensor to be written; `numbers` gives them when it is asked for them."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    numbers: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.kind.block * self.kind.nbytes


def kind_named(name: str) -> Kind:
    return next(kind for kind in KINDS.values() if kind.name == name)


def write_gguf(out: BinaryIO, metadata: dict[str, Any], entries: list[Entry]) -> None:
    """The whole file. Beside what is written memory never holds more than one matrix. ValueError for numbers
    that a type cannot hold."""
    write_header(out, metadata, entries)
    for entry in entries:
        write_numbers(out, entry)
        out.write(bytes(padded(entry.nbytes) - entry.nbytes))


def write_header(out: BinaryIO, metadata: dict[str, Any], entries: list[Entry]) -> None:
    numbers = {kind: number for number, kind in KINDS.items()}
    out.write(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(entries), len(metadata)))
    for key, value in metadata.items():
        out.write(text(key) + typed(value))
    offset = 0
    for entry in entries:
        out.write(text(entry.name) + struct.pack("<I", len(entry.shape)))
        out.write(struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape)))
        out.write(struct.pack("<IQ", numbers[entry.kind], offset))
        offset += padded(entry.nbytes)
    out.write(bytes(padded(out.tell()) - out.tell()))


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def write_numbers(out: BinaryIO, entry: Entry) -> None:
    numbers = entry.numbers()
    if tuple(numbers.shape) != entry.shape:
        raise ValueError(f"{entry.name} is {tuple(numbers.shape)}, not {entry.shape}")
    for chunk in numbers.reshape(-1, entry.kind.block).split(CHUNK // entry.kind.block):
        blocks = quantize(chunk, entry.kind)
        if not dequantized_finite(chunk, blocks):
            raise ValueError(f"{entry.name} holds numbers that {entry.kind.name} cannot hold")
        out.write(blocks.contiguous().view(torch.uint8).numpy().data)


def dequantized_finite(numbers: Tensor, blocks: Tensor) -> bool:
    """Whether nothing was infinite or NaN, or has become so: float16 ends at 65,504."""
    made = blocks if blocks.is_floating_point() else blocks[:, :2].contiguous().view(torch.float16)
    return bool(numbers.isfinite().all() and made.isfinite().all())


# ---- Metadata ----------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def typed(value: Any) -> bytes:
    """A value behind its type: bool, int (uint32), float (float32), str, or a list of one of these (of int:
    int32)."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    if not isinstance(value, list):
        number = TYPE_OF[type(value)]
        return struct.pack(f"<I{SCALARS[number]}", number, value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(text, value))
    number = 6 if value and isinstance(value[0], float) else 5
    return struct.pack(f"<IIQ{len(value)}{SCALARS[number]}", ARRAY, number, len(value), *value)


# ---- Blocks ------------------------------------------------------------------------------------------------


def quantize(blocks: Tensor, kind: Kind) -> Tensor:
    """(n, block) numbers -> (n, nbytes) of uint8, or the plain dtype."""
    if kind.name in PLAIN:
        return blocks.to(PLAIN[kind.name])
    return {"Q8_0": to_q8_0, "Q4_0": to_q4_0}[kind.name](blocks.float())


def reciprocal(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def to_q8_0(x: Tensor) -> Tensor:
    """127 steps to the largest on either side; halves away from zero."""
    d = x.abs().amax(1, keepdim=True) / 127
    steps = x * reciprocal(d)
    whole = steps.abs().floor()
    q = steps.sign() * (whole + (2 * (steps.abs() - whole)).floor())
    return torch.cat((d.half().view(torch.uint8), q.to(torch.int8).view(torch.uint8)), 1)


def to_q4_0(x: Tensor) -> Tensor:
    """The number furthest from zero becomes -8, whatever its sign: d may be negative."""
    furthest = x.gather(1, x.abs().argmax(1, keepdim=True))
    d = furthest / -8
    q = (x * reciprocal(d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat((d.half().view(torch.uint8), q[:, :16] | q[:, 16:] << 4), 1)
