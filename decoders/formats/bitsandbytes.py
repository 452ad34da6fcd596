"""bitsandbytes: 4 bits (nf4, fp4) by blocks of the flattened matrix, 8 bits by rows (LLM.int8).

    4 bits    w = map[q] * absmax[block]      map: 16 numbers, in the file; absmax: a block's largest
              absmax = nested_map[u8] * nested_absmax[block of 256] + offset     if that is quantised too
    8 bits    w = q * SCB[row] / 127          SCB: a row's largest

`weight` holds two numbers a byte, the first in the upper half. Which dtype and shape they had, and how long
a block is, stands as JSON in `weight.quant_state.bitsandbytes__nf4` (`__fp4`), not in `config.json`.
GPT-1's matrices, [in, out] on the hub, were transposed before: here they are transposed back.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import family
from .files import stored_tensors
from .packed import Bits, Packed
from .parts import Parts, Stored, read_parts

NAME = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__"
STATES = (f"{STATE}nf4", f"{STATE}fp4")
FOUR_BIT_PARTS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
)
ONE_127TH = 7.874015718698502e-3  # as the package writes it: a division rounds otherwise
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def recognise(folder: Path, config: dict) -> bool:
    stated = config.get("quantization_config")
    return isinstance(stated, dict) and stated.get("quant_method") == NAME


def tensors(folder: Path, config: dict) -> Stored:
    """(file, name, tensor) of all that the folder holds."""
    stored = read_parts(stored_tensors(folder), ("SCB",), ("weight", "weight_format"), eight_bits)
    stored = read_parts(stored, STATES, FOUR_BIT_PARTS, four_bits)
    for file, name, tensor in stored:
        if family(config) == "openai-gpt" and name.endswith(CONV1D) and isinstance(tensor, Packed):
            tensor = transposed(tensor)
        yield file, name, tensor


def transposed(matrix: Packed) -> Packed:
    def read(dtype: torch.dtype) -> Tensor:
        return matrix.dequantize(dtype).t().contiguous()

    shape = torch.Size(reversed(matrix.shape))
    return Packed(shape, matrix.dtype, matrix.kind, matrix.nbytes, read, matrix.bits)


# ---- 4 bits ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What the JSON beside a matrix says."""

    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_blocksize: int
    nested_offset: float


def state_of(parts: Parts) -> State:
    """ValueError that names file and key for what cannot be."""
    key = next(part for part in parts.tensors if part.startswith(STATE))
    try:
        stated = json.loads(bytes(parts[key].tolist()))
        shape, sizes = stated["shape"], [stated["blocksize"], stated.get("nested_blocksize", 256)]
        state = State(
            sizes[0], DTYPES[stated["dtype"]], tuple(shape), sizes[1], float(stated.get("nested_offset", 0))
        )
        sound = all(type(n) is int and n > 0 for n in [*shape, *sizes]) and len(shape) == 2
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    parts.check(sound, key, "is no JSON of blocksize, dtype and shape")
    return state


def four_bits(parts: Parts) -> Packed:
    state = state_of(parts)
    numbers = math.prod(state.shape)
    packed, absmax = parts["weight"], parts["weight.absmax"]
    parts.check(packed.nbytes == -(-numbers // 2), "weight", f"does not hold {numbers} numbers of 4 bits")
    blocks = -(-numbers // state.blocksize)
    parts.check(absmax.shape == (blocks,), "weight.absmax", f"does not fit {blocks} blocks")
    parts.check(parts["weight.quant_map"].shape == (16,), "weight.quant_map", "must have 16 numbers")
    if absmax.dtype == torch.uint8:
        fits = parts["weight.nested_absmax"].shape == (-(-blocks // state.nested_blocksize),)
        parts.check(fits, "weight.nested_absmax", f"does not fit {blocks} blocks")
        fits = parts["weight.nested_quant_map"].shape == (256,)
        parts.check(fits, "weight.nested_quant_map", "must have 256 numbers")

    def read(dtype: torch.dtype) -> Tensor:
        scale = absmax if absmax.dtype != torch.uint8 else nested(parts, state)
        return dequantize_blocks(packed, parts["weight.quant_map"], scale, state).to(dtype)

    kind = next(part for part in parts.tensors if part.startswith(STATE)).removeprefix(STATE)
    kind += " (double quantised)" if absmax.dtype == torch.uint8 else ""
    return parts.packed(state.shape, state.dtype, f"bitsandbytes {kind}", read)


def nested(parts: Parts, state: State) -> Tensor:
    """(blocks,) float32 of scales that are themselves 8 bits: map[u8] * absmax[block] + offset."""
    scale = parts["weight.nested_quant_map"].float()[parts["weight.absmax"].int()]
    absmax = parts["weight.nested_absmax"].float().repeat_interleave(state.nested_blocksize)
    return scale * absmax[: len(scale)] + state.nested_offset


def dequantize_blocks(packed: Tensor, quant_map: Tensor, absmax: Tensor, state: State) -> Tensor:
    """map[q] * absmax[block] in float32, rounded to the dtype that the weights had."""
    pairs = packed.contiguous().view(torch.uint8).flatten()  # whatever dtype the bytes are stored as
    q = torch.stack((pairs >> 4, pairs & 15), -1).flatten()
    numbers = math.prod(state.shape)
    q = F.pad(q[:numbers], (0, -numbers % state.blocksize)).view(-1, state.blocksize)
    w = quant_map.float()[q.int()].mul_(absmax.float()[:, None])
    return w.to(state.dtype).flatten()[:numbers].view(state.shape)


# ---- 8 bits ------------------------------------------------------------------------------------------------


def eight_bits(parts: Parts) -> Packed:
    q, absmax = parts["weight"], parts["SCB"]
    parts.check(q.dtype == torch.int8 and q.dim() == 2, "weight", "must be a matrix of int8")
    parts.check(absmax.shape == (len(q),), "SCB", f"does not fit {len(q)} rows")
    if "weight_format" in parts:
        by_rows = parts["weight_format"].numel() == 1 and int(parts["weight_format"]) == 0
        parts.check(by_rows, "weight_format", "is a layout of a GPU, and only rows (0) are supported")

    def read(dtype: torch.dtype) -> Tensor:
        return q.float().mul_(absmax.float()[:, None]).mul_(ONE_127TH).to(dtype)

    def stored_bits() -> Bits:
        return Bits(q, absmax.float()[:, None] * ONE_127TH, None)

    return parts.packed(tuple(q.shape), torch.float32, "bitsandbytes int8", read, stored_bits)
