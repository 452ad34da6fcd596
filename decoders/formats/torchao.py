"""torchao, as Transformers saves it to safetensors: int8, int4 in int8, and 8-bit floats.

    whole numbers    w = (qdata - zero_point) * scale     by blocks, often rows or groups of a row
    floats           w = qdata * scale                    in float32

`o_proj._weight_qdata`, `_weight_scale` and `_weight_zero_point` stand for `o_proj.weight`. Its class, block
and dtype are JSON in the metadata of the file. How x is rounded while computing is not a matter of weights.
"""

import json
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .files import stored_tensors
from .packed import Bits, Packed
from .parts import Parts, Stored, in_pairs, read_parts

NAME = "torchao"
WHOLE = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
FLOATS = "Float8Tensor"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8 (e4m3)",
    torch.float8_e5m2: "float8 (e5m2)",
}


def recognise(folder: Path, config: dict) -> bool:
    stated = config.get("quantization_config")
    return isinstance(stated, dict) and stated.get("quant_method") == "torchao"


def tensors(folder: Path, config: dict) -> Stored:
    """(file, name, tensor) of all that the folder holds."""
    described: dict[Path, dict[str, str]] = {}
    matrix = partial(packed_matrix, described)
    names = ("_weight_scale", "_weight_zero_point", "_weight_act_pre_scale")
    yield from read_parts(stored_tensors(folder), ("_weight_qdata",), names, matrix)


def description(described: dict[Path, dict[str, str]], parts: Parts) -> dict:
    """The JSON of one matrix. The header of each file is read once."""
    if parts.file not in described:
        if parts.file.suffix != ".safetensors":
            raise ValueError(f"{parts.file}: torchao's weights are read from safetensors only")
        with safe_open(parts.file, "pt") as content:
            described[parts.file] = content.metadata() or {}
    try:
        found = json.loads(described[parts.file].get(f"{parts.module}.weight", ""))
        attributes, kind = found["_data"], found["_type"]
        attributes["dtype"] = DTYPES[attributes["dtype"]["_data"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"{parts.module}.weight is not described in the header"
        raise ValueError(f"{parts.file}: {message}: torchao's class and dtype are missing") from None
    if kind not in (*WHOLE, FLOATS):
        message = f"{parts.module}.weight is torchao's {str(kind)[:40]}, which is not supported"
        raise ValueError(f"{parts.file}: {message}, only {', '.join((*WHOLE, FLOATS))}")
    return {"kind": kind, **attributes}


def packed_matrix(described: dict[Path, dict[str, str]], parts: Parts) -> Packed:
    stated = description(described, parts)
    q, scale = parts["_weight_qdata"], parts["_weight_scale"]
    wanted = FLOAT8 if stated["kind"] == FLOATS else (torch.int8,)
    parts.check(q.dtype in wanted and q.dim() == 2, "_weight_qdata", f"is no matrix of {stated['kind']}")
    parts.check("_weight_act_pre_scale" not in parts, "_weight_qdata", "has a scale of its input")
    zero = parts.get("_weight_zero_point")
    for part in ("_weight_scale", "_weight_zero_point")[: 1 if zero is None else 2]:
        found = parts[part]
        fits = found.numel() == 1 or (
            found.dim() == 2 and not any(n % max(1, m) for n, m in zip(q.shape, found.shape, strict=True))
        )
        parts.check(fits and found.numel() > 0, part, f"does not divide a matrix of {tuple(q.shape)}")

    def read(dtype: torch.dtype) -> Tensor:
        return dequantize(q, scale, zero, stated["dtype"]).to(dtype)

    kind = KINDS[q.dtype]
    if isinstance(stated.get("target_dtype"), dict):
        kind = f"{str(stated['target_dtype'].get('_data'))[:8]} in int8"
    bits = partial(whole_numbers, q, scale, zero) if kind.startswith("int") else None
    return parts.packed(tuple(q.shape), stated["dtype"], f"torchao {kind}", read, bits)


def whole_numbers(q: Tensor, scale: Tensor, zero: Tensor | None) -> Bits | None:
    """Rows of int8 without a zero; or, if all fit into 4 bits, groups of them."""
    rows = scale.view(-1, 1).expand(len(q), 1) if scale.numel() in (1, len(q)) else scale
    if rows.shape[1] == 1 and (zero is None or not bool(zero.any())):
        return Bits(q, rows, None)
    zeros = torch.zeros(rows.shape, dtype=torch.int8) if zero is None else zero.expand(rows.shape)
    if int(q.amin()) < -8 or int(q.amax()) > 7 or zeros.is_floating_point() or int(zeros.amin()) < -8:
        return Bits(q, rows, zeros)  # which no layer of 4 bits can hold
    if q.shape[1] % 2:
        return None
    return Bits(in_pairs((q + 8).to(torch.uint8)), rows, (zeros + 8).to(torch.uint8))


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(out, in) in `dtype`: (q - zero) * scale of each block."""
    if q.dtype in FLOAT8:
        return (blocks(q.float(), scale) * spread(scale)).view(q.shape).to(dtype)
    w = blocks(q.to(dtype), scale)
    if zero is not None:
        w = w - spread(zero).to(dtype)
    return (w * spread(scale)).view(q.shape).to(dtype)


def blocks(q: Tensor, scale: Tensor) -> Tensor:
    """(out, in) -> (rows of blocks, rows in one, columns of blocks, columns in one)."""
    rows, columns = scale.shape if scale.dim() == 2 else (1, 1)
    return q.unflatten(1, (columns, -1)).unflatten(0, (rows, -1))


def spread(scale: Tensor) -> Tensor:
    """Beside `blocks`: the same for all numbers of a block."""
    rows, columns = scale.shape if scale.dim() == 2 else (1, 1)
    return scale.view(rows, 1, columns, 1)
