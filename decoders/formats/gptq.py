"""GPTQ and AWQ: whole numbers of 2, 3, 4 or 8 bits, a scale and a zero for each group of inputs.

    w[out, in] = scales[group, out] * (q[in, out] - zeros[group, out])

GPTQ (AutoGPTQ, GPTQModel) packs `qweight` along the inputs and `qzeros` along the outputs, lowest bits
first. `g_idx` names the group of each input; with act-order they are scattered. The first version of the
format, "gptq", stores zeros that are one too small, which "gptq_v2" mended.

AWQ ("gemm") packs both along the outputs, eight numbers of 4 bits a word in the order 0, 2, 4, 6, 1, 3, 5, 7,
and keeps its zeros as they are.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .config import family
from .files import stored_tensors
from .folder import read_json_if_any
from .packed import Bits, Packed
from .parts import (
    Parts,
    Stored,
    fill,
    in_order,
    is_sorted,
    joined_gate_up,
    order_of,
    read_parts,
    unpack,
)

NAME = "GPTQ or AWQ"
BITS = (2, 3, 4, 8)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where number i of eight is


def settings(folder: Path, config: dict) -> dict:
    """`quantization_config`, or the file in which AutoGPTQ wrote it at first."""
    stated = config.get("quantization_config")
    if isinstance(stated, dict):
        return stated
    old = read_json_if_any(folder / "quantize_config.json")
    return {"quant_method": "gptq", **old} if "bits" in old else {}


def recognise(folder: Path, config: dict) -> bool:
    return settings(folder, config).get("quant_method") in ("gptq", "awq")


def tensors(folder: Path, config: dict) -> Stored:
    """(file, name, tensor) of all that the folder holds. ValueError for a layout that is not built here."""
    stated = settings(folder, config)
    if stated["quant_method"] == "awq":
        matrix = awq_matrix
        version = stated.get("version") or stated.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise ValueError(f"{folder}: AWQ's version {version!r} is not supported, only gemm")
    else:
        version = stated.get("checkpoint_format") or stated.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise ValueError(f"{folder}: GPTQ's format {version!r} is not supported, only gptq and gptq_v2")
        matrix = partial(gptq_matrix, first_version=version == "gptq")
    names = ("qzeros", "scales", "g_idx")
    stored = read_parts(stored_tensors(folder), ("qweight",), names, matrix)
    yield from joined_gate_up(stored) if family(config) == "phi3" else stored


def bits_of(parts: Parts) -> tuple[int, int, int]:
    """(bits, groups, outputs): `qzeros` has as many words as it takes to hold a zero for each scale."""
    parts.check(parts["scales"].dim() == 2, "scales", "is no matrix")
    groups, outputs = parts["scales"].shape
    parts.check(parts["scales"].is_floating_point(), "scales", "must be floats")
    for part in ("qweight", "qzeros"):
        fits = parts[part].dim() == 2 and parts[part].dtype == torch.int32
        parts.check(fits, part, "must be a matrix of int32")
    bits, rest = divmod(32 * parts["qzeros"].shape[1], outputs) if outputs else (0, 0)
    fits = groups > 0 and not rest and bits in BITS and len(parts["qzeros"]) == groups
    parts.check(fits, "qzeros", f"does not fit scales of {groups} groups and {outputs} outputs")
    return bits, groups, outputs


# ---- GPTQ --------------------------------------------------------------------------------------------------


def gptq_matrix(parts: Parts, first_version: bool) -> Packed:
    bits, groups, outputs = bits_of(parts)
    inputs, rest = divmod(32 * len(parts["qweight"]), bits)
    fits = not rest and parts["qweight"].shape[1] == outputs
    parts.check(fits, "qweight", f"does not hold numbers of {bits} bits for {outputs} outputs")
    if "g_idx" in parts:
        fits = parts["g_idx"].shape == (inputs,)
        parts.check(fits, "g_idx", f"does not name the groups of {inputs} inputs")
    else:
        parts.check(inputs % groups == 0, "scales", f"does not divide {inputs} inputs")

    def read(dtype: torch.dtype) -> Tensor:
        index = group_of_inputs(parts, inputs, groups)
        result = torch.empty(outputs, inputs, dtype=dtype)
        zeros = gptq_zeros(parts["qzeros"], bits, first_version)
        return dequantize_gptq(parts["qweight"], zeros, parts["scales"], index, bits, result)

    def stored_bits() -> Bits | None:
        order = order_of(group_of_inputs(parts, inputs, groups), groups)
        if order is None:
            return None
        q = parts["qweight"].t().contiguous().view(torch.uint8)  # lowest bits first: two a byte
        if is_sorted(order):
            order = None
        else:
            q = in_order(q, bits, inputs, order)
        scales, zeros = parts["scales"].t(), gptq_zeros(parts["qzeros"], bits, first_version).t()
        if bits == 4:
            return Bits(q, scales, zeros, order=order)
        zeros = (zeros.contiguous() ^ 128).view(torch.int8)  # both 128 less, so that they are signed
        return Bits(q.bitwise_xor_(128).view(torch.int8), scales, zeros if zeros.any() else None, order=order)

    kind = f"GPTQ int{bits} by groups of {-(-inputs // groups)}"
    is_whole = bits in (4, 8) and inputs % groups == 0
    return parts.packed(
        (outputs, inputs), parts["scales"].dtype, kind, read, stored_bits if is_whole else None
    )


def group_of_inputs(parts: Parts, inputs: int, groups: int) -> Tensor:
    """(in,): where each input's scale and zero are."""
    if "g_idx" not in parts:
        return torch.arange(groups).repeat_interleave(inputs // groups)
    index = parts["g_idx"].long()
    fits = bool(((index >= 0) & (index < groups)).all())
    parts.check(fits, "g_idx", f"names a group that is not one of {groups}")
    return index


def dequantize_gptq(
    qweight: Tensor, zeros: Tensor, scales: Tensor, index: Tensor, bits: int, result: Tensor
) -> Tensor:
    """`result` (out, in): scales[g] * (q - zeros[g]), in the dtype of the scales, g the group of an input."""
    zeros, each = zeros.to(scales.dtype), len(index) // len(scales)
    by_groups = len(index) % len(scales) == 0 and torch.equal(index, torch.arange(len(index)) // each)

    def rows_of(rows: slice) -> Tensor:
        q = unpack(qweight[:, rows].t(), bits).to(scales.dtype)
        zero, scale = zeros[:, rows].t(), scales[:, rows].t()
        if by_groups:
            q = q.unflatten(1, (len(scales), each))
            return q.sub_(zero[..., None]).mul_(scale[..., None]).flatten(1)
        return q.sub_(zero[:, index]).mul_(scale[:, index])

    return fill(result, rows_of, len(index))


def gptq_zeros(qzeros: Tensor, bits: int, first_version: bool) -> Tensor:
    """(groups, out). The first version stores zero - 1, taken from whole words of 32 bits: a zero of 0 has
    borrowed from its neighbour. Numbers of 3 bits cross words, and are counted modulo 8."""
    if first_version and bits == 3:
        return unpack(qzeros, bits) + 1 & 7
    if first_version:
        ones = sum(1 << i for i in range(0, 32, bits))
        qzeros = (qzeros.long() + ones).to(torch.int32)
    return unpack(qzeros, bits)


# ---- AWQ ---------------------------------------------------------------------------------------------------


def awq_matrix(parts: Parts) -> Packed:
    bits, groups, outputs = bits_of(parts)
    parts.check(bits == 4, "qzeros", f"holds numbers of {bits} bits, and AWQ has 4")
    inputs = len(parts["qweight"])
    fits = parts["qweight"].shape[1] * 8 == outputs and inputs % groups == 0
    parts.check(fits, "qweight", f"does not fit scales of {groups} groups and {outputs} outputs")

    def read(dtype: torch.dtype) -> Tensor:
        return dequantize_awq(parts["qweight"], parts["qzeros"], parts["scales"], dtype)

    def stored_bits() -> Bits | None:
        if inputs % 2:
            return None
        q = torch.empty(outputs // 8, 8, inputs // 2, dtype=torch.uint8)

        def rows_of(words: slice) -> Tensor:
            column = parts["qweight"][:, words].t().contiguous()
            return outputs_of(column[:, ::2]) | outputs_of(column[:, 1::2]) << 4

        zeros = outputs_of(parts["qzeros"].t()).flatten(0, 1)
        return Bits(fill(q, rows_of, 8 * inputs).flatten(0, 1), parts["scales"].t(), zeros)

    kind = f"AWQ int4 by groups of {inputs // groups}"
    return parts.packed((outputs, inputs), parts["scales"].dtype, kind, read, stored_bits)


def dequantize_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in): (q - zeros) * scales, in the dtype of the scales."""
    groups, inputs = len(scales), len(qweight)
    zeros = outputs_of(qzeros.t()).to(scales.dtype)  # (words, 8, groups)
    each = scales.t().unflatten(0, (-1, 8))
    result = torch.empty(qweight.shape[1], 8, inputs, dtype=dtype)

    def rows_of(words: slice) -> Tensor:
        q = outputs_of(qweight[:, words].t().contiguous()).to(scales.dtype).unflatten(2, (groups, -1))
        return q.sub_(zeros[words, ..., None]).mul_(each[words, ..., None]).flatten(2)

    return fill(result, rows_of, 8 * inputs).flatten(0, 1)


def outputs_of(words: Tensor) -> Tensor:
    """(words, n) int32 -> (words, 8, n) uint8: the eight outputs of a word, which one instruction of a GPU
    takes apart in pairs, in their own order."""
    return torch.stack([(words >> 4 * i & 15).to(torch.uint8) for i in AWQ_ORDER], 1)
