"""compressed-tensors (llm-compressor, vLLM) and Transformers' fine-grained fp8: a number times a scale.

    pack-quantized     w = (unpack(weight_packed) - 2 ** (bits - 1) - zero) * weight_scale
    int-quantized      w = (weight - zero) * weight_scale          weight: int8
    float-quantized    w = weight * weight_scale                   weight: float8 (e4m3)
    fp8                w = weight * weight_scale_inv               which is no inverse, whatever it is called

A scale is that of a whole matrix, a row, a group of a row or a block of both. Without a zero point the zero
is 0. Words of int32 hold numbers lowest bits first; those of 3, 5, 6 and 7 bits cross words since version
0.18.0, while before as many were put into a word as fit whole: the width of `weight_packed` tells which.
Zero points are packed along the outputs. Scales of inputs, for arithmetic in 8 bits, are not used.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import abridged
from .files import stored_tensors
from .packed import Bits, Packed
from .parts import Parts, Stored, in_order, is_sorted, order_of, read_parts, unpack

NAME = "compressed-tensors or fp8"
NAMES = ("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx")
DROPPED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")
CACHE = re.compile(r"\.self_attn\.[qkv]_(scale|zero_point)$|\.attn\.attention\.[qkv]_(scale|zero_point)$")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", None)


def settings(config: dict) -> dict:
    stated = config.get("quantization_config") or config.get("compression_config")
    return stated if isinstance(stated, dict) else {}


def recognise(folder: Path, config: dict) -> bool:
    return settings(config).get("quant_method") in ("compressed-tensors", "fp8")


def tensors(folder: Path, config: dict) -> Stored:
    """(file, name, tensor) of all that the folder holds. ValueError for a format that is not built here."""
    stated, where = settings(config), folder / "config.json"
    if stated["quant_method"] == "fp8":
        dtype = config.get("dtype") or config.get("torch_dtype")
        matrix = partial(fine_grained, getattr(torch, dtype) if dtype in DTYPES else None)
        yield from read_parts(stored_tensors(folder), ("weight_scale_inv",), ("weight",), matrix, DROPPED)
        return
    groups = schemes(stated, f"{where}: quantization_config")
    stored = read_parts(
        stored_tensors(folder), ("weight_scale",), NAMES, partial(packed_matrix, groups), DROPPED
    )
    yield from ((file, name, tensor) for file, name, tensor in stored if not CACHE.search(name))


DTYPES = ("float32", "bfloat16", "float16")


# ---- What the config says ----------------------------------------------------------------------------------


def schemes(stated: dict, where: str) -> list[tuple[list[str], dict]]:
    """(targets, arguments of their weights) of each group. ValueError for what is not supported."""
    sparsity = stated.get("sparsity_config")
    sparse = sparsity.get("format") if isinstance(sparsity, dict) else None
    groups = stated.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    named = [stated.get("format"), *(group.get("format") for group in groups if isinstance(group, dict))]
    for form in (sparse, *named):
        if form not in FORMATS:
            message = f"compressed-tensors' format {abridged(form)} is not supported"
            raise ValueError(f"{where}: {message}, only {', '.join(filter(None, FORMATS))}")
    found = []
    for group in groups:
        weights = group.get("weights") if isinstance(group, dict) else None
        targets = group.get("targets") if isinstance(group, dict) else None
        if isinstance(weights, dict) and isinstance(targets, list):
            found.append(([target for target in targets if isinstance(target, str)], weights))
    return found


def scheme_of(module: str, groups: list[tuple[list[str], dict]]) -> dict:
    """That of the group with this very module, or a pattern of its name, or else all of its class."""
    for targets, weights in groups:
        if any(is_target(module, target) for target in targets):
            return weights
    return groups[0][1] if len(groups) == 1 else {}


def is_target(module: str, target: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target[3:], module) is not None
        except re.error:
            return False
    return target in (module, "Linear")


# ---- Matrices ----------------------------------------------------------------------------------------------


def packed_matrix(groups: list[tuple[list[str], dict]], parts: Parts) -> Packed:
    scheme = scheme_of(parts.module, groups)
    scale = parts["weight_scale"]
    parts.check(scale.is_floating_point() and scale.dtype.itemsize > 1, "weight_scale", "must be floats")
    if "weight_packed" in parts:
        return whole_numbers(parts, scheme)
    q = parts["weight"]
    fits = q.dim() == 2 and q.dtype in (torch.int8, torch.float8_e4m3fn)
    parts.check(fits, "weight", "is no matrix of int8 or float8")
    zero = parts.get("weight_zero_point")
    if zero is not None:
        parts.check(zero.shape == scale.shape, "weight_zero_point", "does not fit the scales")
    block = block_of(scheme)
    check_scale(parts, "weight_scale", tuple(q.shape), block)

    def read(dtype: torch.dtype) -> Tensor:
        return dequantize(q, scale, zero, block, group_index(parts, scale, q.shape[1])).to(dtype)

    def stored_bits() -> Bits:
        if scale.numel() == 1:
            return Bits(q, scale.view(1, 1).expand(len(q), 1), None)
        return Bits(q, scale, zero)

    kind = "int8" if q.dtype == torch.int8 else "float8 (e4m3)"
    by_groups = scale.dim() == 2 and len(scale) == len(q) and block is None
    is_whole = q.dtype == torch.int8 and (by_groups or (scale.numel() == 1 and zero is None))
    is_whole = is_whole and "weight_g_idx" not in parts
    bits = stored_bits if is_whole else None
    return parts.packed(tuple(q.shape), scale.dtype, f"compressed-tensors {kind}", read, bits)


def block_of(scheme: dict) -> tuple[int, int] | None:
    """(rows, inputs) that share a scale, where the config says so."""
    block: Any = scheme.get("block_structure")
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    return None


def check_scale(parts: Parts, part: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> None:
    """One scale for all, for each row, for each group of a row, or for each block."""
    scale = parts[part]
    fits = scale.numel() == 1
    if scale.dim() == 2 and scale.numel() > 1:
        rows, columns = scale.shape
        if block:
            fits = (rows, columns) == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        else:
            fits = shape[0] % rows == 0 and shape[1] % columns == 0
    parts.check(fits, part, f"does not divide a matrix of {shape}")


def group_index(parts: Parts, scale: Tensor, inputs: int) -> Tensor | None:
    """(in,): the group of each input, where act-order has scattered them; -1 says that it has not."""
    if "weight_g_idx" not in parts:
        return None
    index = parts["weight_g_idx"].long()
    groups = scale.shape[-1]
    fits = index.shape == (inputs,) and bool(((index >= -1) & (index < groups)).all())
    parts.check(fits, "weight_g_idx", f"does not name {groups} groups of {inputs} inputs")
    return None if bool((index == -1).any()) else index


def whole_numbers(parts: Parts, scheme: dict) -> Packed:
    """`weight_packed`, as wide as the numbers that `weight_shape` says."""
    words, scale = parts["weight_packed"], parts["weight_scale"]
    bits: Any = scheme.get("num_bits")
    parts.check(words.dtype == torch.int32 and words.dim() == 2, "weight_packed", "must be a matrix of int32")
    fits = type(bits) is int and 1 <= bits <= 8
    parts.check(fits, "weight_packed", f"has num_bits {abridged(bits)} in config.json, not 1 to 8")
    shape = tuple(parts["weight_shape"].flatten().tolist())
    parts.check(len(shape) == 2 and min(shape) > 0, "weight_shape", "must be two positive numbers")
    fits = len(words) == shape[0] and words.shape[1] in widths(shape[1], bits)
    parts.check(fits, "weight_packed", f"does not hold {shape} numbers of {bits} bits")
    check_scale(parts, "weight_scale", shape, None)
    zero = None
    if "weight_zero_point" in parts:
        zero = parts["weight_zero_point"]
        fits = zero.dtype == torch.int32 and zero.dim() == 2 and scale.dim() == 2
        fits = fits and zero.shape[1] == scale.shape[1] and len(zero) in widths(len(scale), bits)
        parts.check(fits, "weight_zero_point", f"does not fit scales of {tuple(scale.shape)}")

    def read(dtype: torch.dtype) -> Tensor:
        q = signed(words, bits, shape[1])
        zeros = None if zero is None else signed(zero.t(), bits, len(scale)).t()
        return dequantize(q, scale, zeros, None, group_index(parts, scale, shape[1])).to(dtype)

    def stored_bits() -> Bits | None:
        index = group_index(parts, scale, shape[1])
        order = None if index is None else order_of(index, scale.shape[1])
        if shape[1] % 8 or (index is not None and order is None):
            return None
        q = words.contiguous().view(torch.uint8)  # lowest bits first: two a byte
        if order is not None and is_sorted(order):
            order = None
        elif order is not None:
            q = in_order(q, bits, shape[1], order)
        zeros = None if zero is None else signed(zero.t(), bits, len(scale)).t()
        if bits == 8:
            return Bits((q ^ 128).view(torch.int8), scale, zeros, order=order)
        zeros = torch.zeros(scale.shape) if zeros is None else zeros
        return Bits(q, scale, (zeros + 8).to(torch.uint8), order=order)

    groups = scale.shape[-1] if scale.dim() == 2 else 1
    kind = f"compressed-tensors int{bits} by groups of {shape[1] // groups}"
    is_whole = bits in (4, 8) and scale.dim() == 2 and len(scale) == shape[0]
    return parts.packed(shape, scale.dtype, kind, read, stored_bits if is_whole else None)


def widths(count: int, bits: int) -> tuple[int, int]:
    """Words for `count` numbers: as one stream of bits, and with as many in each as fit whole."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def signed(words: Tensor, bits: int, count: int) -> Tensor:
    """(..., count) int8 out of the last dimension, stored 2 ** (bits - 1) too large."""
    stream, whole = widths(count, bits)
    if words.shape[-1] == stream:
        q = unpack(words, bits, count)
    else:  # the last bits of each word are of no use
        shifts = range(0, 32 // bits * bits, bits)
        q = torch.stack([words >> shift & (2**bits - 1) for shift in shifts], -1)
        q = q.flatten(-2)[..., :count].to(torch.uint8)
    return (q.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def dequantize(
    q: Tensor, scale: Tensor, zero: Tensor | None, block: tuple[int, int] | None, index: Tensor | None
) -> Tensor:
    """(out, in): (q - zero) * scale, each step rounded to the dtype of the scale."""
    w = q.to(scale.dtype)
    if index is not None:  # the group of each input
        w = w if zero is None else w.sub_(zero.to(scale.dtype)[:, index])
        return w.mul_(scale[:, index])
    if block:
        return w.mul_(blocks(scale, block, w.shape))
    rows, columns = scale.shape if scale.dim() == 2 else (1, 1)
    parts = w.unflatten(1, (columns, -1)).unflatten(0, (rows, -1))  # (rows, rows in one, columns, inputs)
    if zero is not None:
        parts = parts.sub_(zero.to(scale.dtype).reshape(rows, 1, columns, 1))
    return parts.mul_(scale.view(rows, 1, columns, 1)).view(w.shape)


def blocks(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """(out, in): the scale of each number; blocks at the edges are cut off."""
    if scale.numel() == 1:
        return scale.view(1, 1)
    rows = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


# ---- Transformers' own fp8 ---------------------------------------------------------------------------------


def fine_grained(dtype: torch.dtype | None, parts: Parts) -> Packed:
    """weight * weight_scale_inv in float32, rounded to the dtype of the model."""
    q, scale = parts["weight"], parts["weight_scale_inv"]
    parts.check(q.dtype == torch.float8_e4m3fn and q.dim() == 2, "weight", "is no matrix of float8 (e4m3)")
    parts.check(scale.is_floating_point() and scale.dtype.itemsize > 1, "weight_scale_inv", "must be floats")
    check_scale(parts, "weight_scale_inv", tuple(q.shape), None)
    own = dtype or scale.dtype

    def read(dtype: torch.dtype) -> Tensor:
        return dequantize(q, scale.float(), None, None, None).to(own).to(dtype)

    return parts.packed(tuple(q.shape), own, "fp8", read)
