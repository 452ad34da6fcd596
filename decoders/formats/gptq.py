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
from .parts import Parts, Stored, in_order, joined_gate_up, order_of, read_parts, unpack

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

    def read() -> Tensor:
        index = group_of_inputs(parts, inputs, groups)
        return dequantize_gptq(parts["qweight"], parts["qzeros"], parts["scales"], index, bits, first_version)

    def stored_bits() -> Bits | None:
        order = order_of(group_of_inputs(parts, inputs, groups), groups)
        if order is None:
            return None
        q, order = in_order(unpack(parts["qweight"].t(), bits), order)
        zeros = gptq_zeros(parts["qzeros"], bits, first_version).t()
        if bits == 8:  # both 128 less, so that they are signed
            q, zeros = ((t ^ 128).view(torch.int8) for t in (q, zeros.contiguous()))
        scales = parts["scales"].t()
        return Bits(q, scales, zeros if bits == 4 or zeros.any() else None, order=order)

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
    qweight: Tensor, qzeros: Tensor, scales: Tensor, index: Tensor, bits: int, first_version: bool
) -> Tensor:
    """(out, in): scales[g] * (q - zeros[g]), in the dtype of the scales, g the group of an input."""
    q = unpack(qweight.t(), bits)
    zeros = gptq_zeros(qzeros, bits, first_version).t()  # (out, groups)
    centered = q.to(scales.dtype) - zeros.to(scales.dtype)[:, index]
    return centered.mul_(scales.t()[:, index])


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

    def read() -> Tensor:
        return dequantize_awq(parts["qweight"], parts["qzeros"], parts["scales"])

    def stored_bits() -> Bits:
        q, zeros = (unscrambled(unpack(parts[part], 4)).t() for part in ("qweight", "qzeros"))
        return Bits(q, parts["scales"].t(), zeros)

    kind = f"AWQ int4 by groups of {inputs // groups}"
    return parts.packed((outputs, inputs), parts["scales"].dtype, kind, read, stored_bits)


def dequantize_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """(out, in): (q - zeros) * scales, in the dtype of the scales."""
    q, zeros = (unscrambled(unpack(words, 4)).to(scales.dtype) for words in (qweight, qzeros))
    centered = q.unflatten(0, (len(scales), -1)) - zeros[:, None]  # (groups, inputs of one, out)
    return centered.mul_(scales[:, None]).flatten(0, 1).t().contiguous()


def unscrambled(numbers: Tensor) -> Tensor:
    """AWQ's eight numbers of a word, which one instruction of a GPU takes apart in pairs, as they were."""
    return numbers.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)
