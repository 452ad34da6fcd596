"""HQQ: whole numbers of 1, 2, 3, 4 or 8 bits, a scale and a zero, both floats, for each group.

    w = (q - zero[group]) * scale[group]

The matrix was reshaped to (groups, group_size) where axis is 1, or (group_size, groups) where it is 0. Its
rows were cut into equal parts, and a word holds the same row of all parts, that of the first in its highest
bits: 8 / nbits parts of a byte, or for 3 bits ten of an int32, padded to a multiple of ten rows. How a matrix
is packed stands beside it, in tensors of one number or of ASCII.
"""

from pathlib import Path

import torch
from torch import Tensor

from .files import stored_tensors
from .packed import Packed
from .parts import Parts, Stored, read_parts

NAME = "HQQ"
PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1, "3bit_32": 3}
META = (
    "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "view_as_float", "unpack_view_dtype",
    "quant_scale", "quant_zero", "compute_dtype", "channel_wise", "encoded_state_dict", "offload_meta",
    "optimize", "round_zero", "stores_quant_config",
)  # fmt: skip


def recognise(folder: Path, config: dict) -> bool:
    stated = config.get("quantization_config")
    return isinstance(stated, dict) and stated.get("quant_method") == "hqq"


def tensors(folder: Path, config: dict) -> Stored:
    """(file, name, tensor) of all that the folder holds."""
    yield from read_parts(stored_tensors(folder), ("W_q",), META, packed_matrix)


def number(parts: Parts, part: str, default: int | None = None) -> int:
    if default is not None and part not in parts:
        return default
    parts.check(parts[part].numel() == 1, part, "must be one number")
    return int(parts[part])


def text(parts: Parts, part: str) -> str:
    parts.check(parts[part].dtype == torch.uint8 and parts[part].dim() == 1, part, "must be ASCII")
    return bytes(parts[part].tolist()).decode("ascii", "replace")


def packed_matrix(parts: Parts) -> Packed:
    packing, axis, group = text(parts, "packing"), number(parts, "axis"), number(parts, "group_size", 0)
    parts.check(packing in PACKINGS, "packing", f"says {packing!r}, not one of {', '.join(PACKINGS)}")
    for part in ("quant_scale", "quant_zero", "view_as_float"):
        parts.check(not number(parts, part, 0), part, "is set, which is not supported")
    parts.check(axis in (0, 1), "axis", f"says {axis}, not 0 or 1")
    shape = tuple(parts["shape"].flatten().tolist())
    parts.check(len(shape) == 2 and min(shape) > 0, "shape", "must be two positive numbers")
    numbers = shape[0] * shape[1]
    group = group or shape[axis]
    parts.check(group > 0 and numbers % group == 0, "group_size", f"does not divide {numbers} numbers")
    rows, columns = (numbers // group, group) if axis else (group, numbers // group)
    check_stored(parts, PACKINGS[packing], rows, columns)
    scales = (rows, 1) if axis else (1, columns)
    for part in ("scale", "zero"):
        fits = parts[part].shape == scales and parts[part].is_floating_point()
        parts.check(fits, part, f"must be floats of {scales}")

    def read(dtype: torch.dtype) -> Tensor:
        q = unpack_rows(parts["W_q"], PACKINGS[packing], rows)
        return dequantize(q, parts["zero"], parts["scale"]).view(shape).to(dtype)

    kind = f"HQQ int{PACKINGS[packing]} by groups of {group}"
    return parts.packed(shape, parts["scale"].dtype, kind, read)


def check_stored(parts: Parts, bits: int, rows: int, columns: int) -> None:
    cuts = 10 if bits == 3 else 8 // bits
    stored = -(-rows // cuts) if bits == 3 else rows // cuts
    dtype = torch.int32 if bits == 3 else torch.uint8
    fits = parts["W_q"].dtype == dtype and parts["W_q"].shape == (stored, columns)
    fits = fits and (bits == 3 or stored * cuts == rows)
    parts.check(fits, "W_q", f"does not hold {rows} rows of {columns} numbers of {bits} bits")


def unpack_rows(words: Tensor, bits: int, rows: int) -> Tensor:
    """(rows, columns) uint8: the parts one below the other, the first from the highest bits."""
    cuts = 10 if bits == 3 else 8 // bits
    parts = [words >> bits * (cuts - 1 - i) & (2**bits - 1) for i in range(cuts)]
    return torch.cat([part.to(torch.uint8) for part in parts])[:rows]


def dequantize(q: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """(q - zero) * scale, each step rounded to the dtype of the scale."""
    return q.to(scale.dtype).sub_(zero).mul_(scale)
