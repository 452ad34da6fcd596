"""What the bytes of each GGUF tensor type mean: blocks of a row -> float32 numbers.

A row is cut into blocks of 32 or 256 numbers, and each block has its own scale d, in float16. The older types
have one scale and store either q around zero (`d * (q - 8)`) or q and a minimum (`d * q + m`). The k-quants
cut their 256 numbers into 8 or 16 groups, whose scales (and minima) are small whole numbers, so that

    number = d * scale[group] * q - dmin * minimum[group]

Every formula takes blocks (n, nbytes) of uint8 and gives (n, block) of float32, the same bits as llama.cpp
and the `gguf` package give.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .gguf import Kind
from .packed import Bits
from .parts import in_pairs

CHUNK = 2**18  # numbers that are made at a time: they and what leads to them stay in the cache


class Compiled(Protocol):
    """The formulas below in another language. Each fills its last argument with what blocks (n, bytes) of a
    type stand for, the same bits as here, or is False."""

    def dequantize_blocks(self, blocks: Tensor, kind: str, numbers: Tensor) -> bool: ...

    def whole_numbers(self, blocks: Tensor, kind: str, q: Tensor) -> bool: ...


COMPILED: list[Compiled] = []  # where `use_compiled` puts it
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(packed: Tensor, kind: Kind, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The numbers of a tensor as `dtype`; `packed` is its bytes (nbytes,). Beside the result there is never
    more than `CHUNK` numbers."""
    if kind.name in PLAIN:
        return packed.view(PLAIN[kind.name]).view(shape).to(dtype)
    formula, blocks = FORMULAS[kind.name], packed.view(-1, kind.nbytes)
    numbers = torch.empty(shape, dtype=dtype)
    if COMPILED and COMPILED[0].dequantize_blocks(blocks, kind.name, numbers):
        return numbers
    for target, chunk in zip(
        numbers.view(-1, kind.block).split(CHUNK // kind.block),
        blocks.split(CHUNK // kind.block),
        strict=True,
    ):
        target.copy_(formula(chunk))
    return numbers


def use_compiled(functions: Compiled) -> None:
    """From now on these are asked first."""
    COMPILED[:] = [functions]


def whole_numbers(packed: Tensor, kind: Kind, shape: tuple[int, ...]) -> Bits:
    """The same as whole numbers with a scale, for the types that are just that: Q8_0, Q4_0 with a zero of 8,
    Q4_1 with a minimum."""
    rows, columns = shape
    blocks = packed.view(-1, kind.nbytes)
    floats = 2 if kind.name == "Q4_1" else 1  # the scale, the minimum
    tables = blocks[:, : 2 * floats].contiguous().view(torch.float16).t().contiguous().view(floats, rows, -1)
    q = torch.empty(len(blocks), 32 if kind.name == "Q8_0" else 16, dtype=torch.uint8)
    if not COMPILED or not COMPILED[0].whole_numbers(blocks, kind.name, q):
        for target, chunk in zip(q.split(CHUNK // 32), blocks.split(CHUNK // 32), strict=True):
            numbers = chunk[:, 2 * floats :]
            target.copy_(numbers if kind.name == "Q8_0" else in_pairs(planes(numbers, 4)))
    if kind.name == "Q8_0":
        return Bits(q.view(torch.int8).view(rows, columns), tables[0])
    q = q.view(rows, columns // 2)
    if kind.name == "Q4_1":
        return Bits(q, tables[0], minimum=tables[1])
    return Bits(q, tables[0], torch.full_like(tables[0], 8, dtype=torch.uint8))


# ---- Pieces of a block -------------------------------------------------------------------------------------


def half(b: Tensor) -> Tensor:
    """Two bytes (n, 2), a float16 -> (n, 1)."""
    return b.contiguous().view(torch.float16).float()


def planes(b: Tensor, width: int) -> Tensor:
    """(..., bytes) -> (..., bytes * 8 / width): the lowest `width` bits of all bytes, then the next of all.
    So with 4 bits byte j holds the numbers j and bytes + j."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)
    return (b[..., None, :] >> shifts[:, None] & 2**width - 1).flatten(-2)


def fields(b: Tensor, width: int) -> Tensor:
    """(..., bytes) -> (..., bytes * 8 / width): all bits of the first byte, lowest first, then the next."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)
    return (b[..., None] >> shifts & 2**width - 1).flatten(-2)


# ---- One scale for 32 numbers ------------------------------------------------------------------------------


def q8_0(b: Tensor) -> Tensor:
    """d, 32 int8."""
    return half(b[:, :2]) * b[:, 2:].view(torch.int8)


def q4_0(b: Tensor) -> Tensor:
    """d, 16 bytes of two numbers."""
    return half(b[:, :2]) * (planes(b[:, 2:], 4).float() - 8)


def q4_1(b: Tensor) -> Tensor:
    """d, minimum, 16 bytes of two numbers."""
    return half(b[:, :2]) * planes(b[:, 4:], 4) + half(b[:, 2:4])


def q5_0(b: Tensor) -> Tensor:
    """d, 32 fifth bits, 16 bytes of the lower four."""
    q = planes(b[:, 6:], 4) + 16 * fields(b[:, 2:6], 1)
    return half(b[:, :2]) * (q.float() - 16)


def q5_1(b: Tensor) -> Tensor:
    """d, minimum, 32 fifth bits, 16 bytes of the lower four."""
    q = planes(b[:, 8:], 4) + 16 * fields(b[:, 4:8], 1)
    return half(b[:, :2]) * q + half(b[:, 2:4])


# ---- k-quants: 256 numbers in groups -----------------------------------------------------------------------


def grouped(q: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """scale * q - minimum. q (n, 256); scale and minimum (n, groups), d already in them."""
    q = q.view(*scale.shape, -1) * scale[..., None]
    return (q if minimum is None else q - minimum[..., None]).flatten(1)


def six_bits(b: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes. Of the first four each has a byte, in whose top
    two bits are the upper bits of the other four; their lower four share the last bytes."""
    scale, minimum, low = b[:, :4], b[:, 4:8], b[:, 8:]
    scale = torch.cat((scale & 63, low & 15 | scale >> 6 << 4), 1)
    return scale, torch.cat((minimum & 63, low >> 4 | minimum >> 6 << 4), 1)


def q2_k(b: Tensor) -> Tensor:
    """16 bytes of a scale and a minimum, 64 bytes of four numbers, d, dmin."""
    q = planes(b[:, 16:80].view(-1, 2, 32), 2)
    return grouped(q, half(b[:, 80:82]) * (b[:, :16] & 15), half(b[:, 82:84]) * (b[:, :16] >> 4))


def q3_k(b: Tensor) -> Tensor:
    """256 third bits, 64 bytes of the lower two, 16 scales of 6 bits in 12 bytes, d."""
    q = planes(b[:, 32:96].view(-1, 2, 32), 2).flatten(1) + 4 * planes(b[:, :32], 1)
    scale = planes(b[:, 96:104], 4) + 16 * planes(b[:, 104:108], 2)
    return grouped(q.float() - 4, half(b[:, 108:]) * (scale.float() - 32))


def q4_k(b: Tensor) -> Tensor:
    """d, dmin, scales and minima, four times 32 bytes of two numbers."""
    scale, minimum = six_bits(b[:, 4:16])
    q = planes(b[:, 16:].view(-1, 4, 32), 4)
    return grouped(q, half(b[:, :2]) * scale, half(b[:, 2:4]) * minimum)


def q5_k(b: Tensor) -> Tensor:
    """d, dmin, scales and minima, 256 fifth bits, four times 32 bytes of the lower four."""
    scale, minimum = six_bits(b[:, 4:16])
    q = planes(b[:, 48:].view(-1, 4, 32), 4).flatten(1) + 16 * planes(b[:, 16:48], 1)
    return grouped(q, half(b[:, :2]) * scale, half(b[:, 2:4]) * minimum)


def q6_k(b: Tensor) -> Tensor:
    """Twice 64 bytes of lower four bits, twice 32 bytes of the upper two, 16 scales of int8, d."""
    q = planes(b[:, :128].view(-1, 2, 64), 4) + 16 * planes(b[:, 128:192].view(-1, 2, 32), 2)
    return grouped(q.float() - 32, half(b[:, 208:]) * b[:, 192:208].view(torch.int8))


# ---- Four bits that choose from a table --------------------------------------------------------------------

UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # denser around zero
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # floats of one mantissa bit, doubled


def iq4_nl(b: Tensor) -> Tensor:
    """d, 16 bytes of two numbers."""
    return half(b[:, :2]) * torch.tensor(UNEVEN)[planes(b[:, 2:], 4).int()]


def iq4_xs(b: Tensor) -> Tensor:
    """d, eight scales of 6 bits (upper two in two bytes, lower four in four), eight times 16 bytes."""
    scale = fields(b[:, 4:8], 4) + 16 * fields(b[:, 2:4], 2)
    q = torch.tensor(UNEVEN)[planes(b[:, 8:].view(-1, 8, 16), 4).int()]
    return grouped(q, half(b[:, :2]) * (scale.float() - 32))


def mxfp4(b: Tensor) -> Tensor:
    """An exponent, 16 bytes of two floats of four bits."""
    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    exponent = b[:, :1].long() - 128  # one less than OCP's, as the table is doubled
    scale = (exponent + 1023 << 52).view(torch.float64).float()  # 2.0 ** exponent, exactly
    return scale * table[planes(b[:, 1:], 4).int()]


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "MXFP4": mxfp4,
}
