"""MLX: whole numbers of 2 to 8 bits, a scale and a bias for each group of inputs; or mxfp4.

    affine    w = scales[out, group] * q + biases[out, group]
    mxfp4     w = 2 ** (scales[out, group] - 127) * (0, .5, 1, 1.5, 2, 3, 4, 6 or one of these negative)

`weight` is uint32 [out, in * bits / 32], one stream of bits a row, lowest first. Each product and each sum is
rounded to the dtype of the scales. The token embedding and the output layer are packed too. `biases` are
not `bias`, the layer's own, which may stand beside them.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import stored_tensors
from .packed import Bits, Packed
from .parts import Parts, Stored, fill, grouped, read_parts, unpack

NAME = "MLX"
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # E2M1; the fourth bit is the sign


def recognise(folder: Path, config: dict) -> bool:
    """MLX writes `quantization`, and a `quantization_config` that names no method."""
    stated = config.get("quantization") or config.get("quantization_config")
    return isinstance(stated, dict) and "bits" in stated and "quant_method" not in stated


def tensors(folder: Path, config: dict) -> Stored:
    """(file, name, tensor) of all that the folder holds."""
    stated = config.get("quantization") or config["quantization_config"]
    matrix = partial(packed_matrix, stated, f"{folder / 'config.json'}: quantization")
    yield from read_parts(stored_tensors(folder), ("scales",), ("weight", "biases"), matrix)


def packed_matrix(stated: dict, where: str, parts: Parts) -> Packed:
    """One that the config's `quantization` describes: as all are, or under its own name."""
    own = stated.get(parts.module)
    own = {**stated, **own} if isinstance(own, dict) else stated
    bits, group = own.get("bits"), own.get("group_size", 64)
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"{where}: bits must be a number from 2 to 8, not {bits!r}")
    if type(group) is not int or group < 1:
        raise ValueError(f"{where}: group_size must be a positive integer, not {group!r}")
    mode = own.get("mode", "affine")
    if mode not in ("affine", "mxfp4"):
        raise ValueError(f"{where}: mode {mode!r} is not supported, only affine and mxfp4")
    inputs = check_shapes(parts, bits, group)
    shape = len(parts["scales"]), inputs
    if mode == "mxfp4":
        fits = parts["scales"].dtype == torch.uint8 and bits == 4
        parts.check(fits, "scales", "must be uint8 beside numbers of 4 bits")
        read: Any = partial(dequantize_mxfp4, parts["weight"], parts["scales"])
        return parts.packed(shape, torch.bfloat16, "MLX mxfp4", read)
    fits = parts["biases"].shape == parts["scales"].shape
    parts.check(fits, "biases", f"does not fit scales of {tuple(parts['scales'].shape)}")
    parts.check(parts["scales"].is_floating_point(), "scales", "must be floats")
    read = partial(dequantize_affine, parts["weight"], parts["scales"], parts["biases"], bits)

    def stored_bits() -> Bits:
        return Bits(parts["weight"].view(torch.uint8), parts["scales"], minimum=parts["biases"])

    kind, dtype = f"MLX int{bits} by groups of {group}", parts["scales"].dtype
    return parts.packed(shape, dtype, kind, read, stored_bits if bits == 4 else None)


def check_shapes(parts: Parts, bits: int, group: int) -> int:
    """How many inputs the matrix has."""
    words, scales = parts["weight"], parts["scales"]
    parts.check(words.dtype == torch.uint32 and words.dim() == 2, "weight", "must be a matrix of uint32")
    fits = scales.dim() == 2 and len(scales) == len(words) and scales.shape[1] > 0
    parts.check(fits, "scales", f"does not fit {len(words)} rows")
    inputs = scales.shape[1] * group
    fits = inputs * bits == 32 * words.shape[1]
    parts.check(fits, "weight", f"does not hold {inputs} numbers of {bits} bits a row")
    return inputs


def dequantize_affine(words: Tensor, scales: Tensor, biases: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """(out, in): scales * q + biases, rounded after the product and after the sum."""
    groups, inputs = scales.shape[1], words.shape[1] * 32 // bits

    def rows_of(rows: slice) -> Tensor:
        q = grouped(unpack(words[rows], bits).to(scales.dtype), groups)
        return q.mul_(scales[rows, :, None]).add_(biases[rows, :, None]).flatten(1)

    return fill(torch.empty(len(words), inputs, dtype=dtype), rows_of, inputs)


def dequantize_mxfp4(words: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in): 2 ** (scale - 127) * value, which bfloat16 holds."""
    values = torch.tensor([*FP4, *(-value for value in FP4)])
    powers = torch.exp2(scales.float() - 127)
    inputs = words.shape[1] * 8

    def rows_of(rows: slice) -> Tensor:
        w = grouped(values[unpack(words[rows], 4).int()], scales.shape[1])
        return w.mul_(powers[rows, :, None]).flatten(1)

    return fill(torch.empty(len(words), inputs, dtype=dtype), rows_of, inputs)
