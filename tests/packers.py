"""Folders in every packaging, packed number by number, bit by bit, without any of what reads them.

A packer takes a shape (out, in) and draws what a matrix of that shape may hold: it returns the parts as they
lie in a file, and the matrix that they stand for, worked out in float64 and rounded where the packaging rounds.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import folders
from tests.families import FUYU, GPT_NEO, OPENAI_GPT, PERSIMMON, PHI, PHI3, Family

Made = tuple[dict[str, Tensor], Tensor]  # part -> tensor, and the plain matrix
Draw = torch.Generator

SIZES = {  # that 32 divides, and that differ from each other
    "gpt_neo": {"hidden_size": 64, "intermediate_size": 128},
    "openai-gpt": {"n_embd": 64},
    "phi": {"hidden_size": 64, "intermediate_size": 128},
    "phi3": {"hidden_size": 64, "intermediate_size": 128, "sliding_window": 7},
    "persimmon": {"hidden_size": 64, "intermediate_size": 128},
    "fuyu": {"hidden_size": 64, "intermediate_size": 128},
}
EVERY = (GPT_NEO, OPENAI_GPT, PHI, PHI3, PERSIMMON, FUYU)
LINEAR = (GPT_NEO, PHI, PHI3, PERSIMMON, FUYU)  # without GPT-1's Conv1D


# ---- Numbers and bits --------------------------------------------------------------------------------------


def whole(draw: Draw, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers from low to high, the ends among them."""
    return torch.randint(low, high + 1, shape, generator=draw)


def scales(draw: Draw, dtype: torch.dtype, *shape: int) -> Tensor:
    """Positive, of all sizes between 0.002 and 0.02: a model of them gives sane numbers."""
    return (torch.rand(shape, generator=draw) * 0.018 + 0.002).to(dtype)


def words(numbers: Tensor, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """(..., n) as one stream of bits, lowest first, in words of 32; the last is filled up with zeros."""
    stream = torch.stack([numbers >> i & 1 for i in range(bits)], -1).flatten(-2)
    stream = nn.functional.pad(stream, (0, -stream.shape[-1] % 32))
    return of_bits(stream.unflatten(-1, (-1, 32)), dtype)


def of_bits(stream: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 32) bits, lowest first -> (...) words."""
    value = sum(stream[..., i].long() << i for i in range(32))
    return value.to(torch.uint32).view(dtype)


def words_with_gaps(numbers: Tensor, bits: int) -> Tensor:
    """As many numbers in a word as fit whole."""
    each = 32 // bits
    padded = nn.functional.pad(numbers, (0, -numbers.shape[-1] % each)).unflatten(-1, (-1, each))
    value = sum(padded[..., i].long() << bits * i for i in range(each))
    return value.to(torch.uint32).view(torch.int32)


def by_groups(table: Tensor, inputs: int) -> Tensor:
    """(out, groups) -> (out, in)."""
    return table.repeat_interleave(inputs // table.shape[1], 1)


# ---- The packagings ----------------------------------------------------------------------------------------


def gptq(
    shape: tuple[int, int],
    draw: Draw,
    bits: int = 4,
    group: int = 32,
    first: bool = True,
    symmetric: bool = False,
    act_order: bool = False,
    with_index: bool = True,
) -> Made:
    outputs, inputs = shape
    groups = inputs // group
    q = whole(draw, 0, 2**bits - 1, outputs, inputs)
    zeros = whole(draw, 0, 2**bits - 1, outputs, groups)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    index = torch.arange(groups).repeat_interleave(group)
    if act_order:
        index = index[torch.randperm(inputs, generator=draw)]
    scale = scales(draw, torch.float16, outputs, groups)
    w = (q - zeros[:, index]).double() * scale.double()[:, index]
    stored = words(zeros.t(), bits)
    if first and bits == 3:  # a number may lie in two words: each is counted modulo 8
        stored = words(zeros.t() - 1 & 7, bits)
    elif first:  # whole words: a zero of 0 borrows from the next
        one = int(words(torch.ones(32 // bits, dtype=torch.long), bits))
        stored = (stored.long() - one).to(torch.int32)
    parts = {"qweight": words(q, bits).t(), "qzeros": stored, "scales": scale.t()}
    if with_index:
        parts["g_idx"] = index.int()
    return parts, w.half()


def awq(shape: tuple[int, int], draw: Draw, group: int = 32) -> Made:
    outputs, inputs = shape
    q, zeros = whole(draw, 0, 15, outputs, inputs), whole(draw, 0, 15, outputs, inputs // group)
    scale = scales(draw, torch.float16, outputs, inputs // group)
    w = (q - by_groups(zeros, inputs)).double() * by_groups(scale, inputs).double()

    def packed(numbers: Tensor) -> Tensor:
        return words(numbers.t().unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2), 4)

    return {"qweight": packed(q), "qzeros": packed(zeros), "scales": scale.t()}, w.half()


NF4 = torch.linspace(-1, 1, 16) ** 3  # any sixteen numbers do
FP4 = torch.tensor([0, 0.005, 0.66, 1, 0.33, 0.5, 0.16, 0.25]).repeat(2) * torch.tensor(
    [1.0, -1.0]
).repeat_interleave(8)


def bnb4(
    shape: tuple[int, int],
    draw: Draw,
    kind: str = "nf4",
    nested: bool = False,
    blocksize: int = 64,
    dtype: str = "float16",
) -> Made:
    numbers = shape[0] * shape[1]
    q = whole(draw, 0, 15, numbers)
    values = NF4 if kind == "nf4" else FP4
    blocks = -(-numbers // blocksize)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": dtype, "shape": list(shape)}
    parts = {"weight.quant_map": values}
    if nested:
        table, outer = torch.rand(256, generator=draw) * 0.1, torch.rand(-(-blocks // 256), generator=draw)
        codes = whole(draw, 0, 255, blocks)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0625}
        absmax = table[codes] * outer.repeat_interleave(256)[:blocks] + 0.0625
        parts |= {
            "weight.absmax": codes.byte(),
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": table,
        }
    else:
        absmax = scales(draw, torch.float32, blocks)
        parts["weight.absmax"] = absmax
    w = (values[q].double() * absmax.double().repeat_interleave(blocksize)[:numbers]).float()
    even = nn.functional.pad(q, (0, numbers % 2))
    parts["weight"] = (even[::2] << 4 | even[1::2]).byte()[:, None]
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    return parts, w.to(getattr(torch, dtype)).view(shape)


def bnb8(shape: tuple[int, int], draw: Draw) -> Made:
    q, absmax = whole(draw, -127, 127, *shape).to(torch.int8), torch.rand(shape[0], generator=draw)
    w = (q.float() * absmax[:, None]) * 7.874015718698502e-3
    parts = {"weight": q, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, w


def mlx(
    shape: tuple[int, int], draw: Draw, bits: int = 4, group: int = 32, dtype: torch.dtype = torch.bfloat16
) -> Made:
    q = whole(draw, 0, 2**bits - 1, *shape)
    scale = scales(draw, dtype, shape[0], shape[1] // group)
    bias = -scales(draw, dtype, shape[0], shape[1] // group)
    product = (q.double() * by_groups(scale, shape[1]).double()).to(dtype)
    w = (product.double() + by_groups(bias, shape[1]).double()).to(dtype)
    return {"weight": words(q, bits, torch.uint32), "scales": scale, "biases": bias}, w


def mxfp4(shape: tuple[int, int], draw: Draw) -> Made:
    q, exponent = whole(draw, 0, 15, *shape), whole(draw, 117, 122, shape[0], shape[1] // 32)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat([values, -values])
    w = values[q] * torch.pow(2.0, by_groups(exponent, shape[1]).double() - 127)
    return {"weight": words(q, 4, torch.uint32), "scales": exponent.byte()}, w.bfloat16()


def ct_packed(
    shape: tuple[int, int],
    draw: Draw,
    bits: int = 4,
    groups: int = 2,
    symmetric: bool = True,
    gaps: bool = False,
    act_order: bool = False,
) -> Made:
    outputs, inputs = shape
    pack = words_with_gaps if gaps else words
    half, dtype = 2 ** (bits - 1), torch.bfloat16
    q = whole(draw, -half, half - 1, *shape)
    scale = scales(draw, dtype, outputs, groups)
    index = torch.arange(groups).repeat_interleave(inputs // groups)
    parts = {
        "weight_packed": pack(q + half, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(shape),
    }
    zeros = torch.zeros(outputs, groups, dtype=torch.long)
    if not symmetric:
        zeros = whole(draw, -half, half - 1, outputs, groups)
        parts["weight_zero_point"] = pack((zeros + half).t(), bits).t()
    if act_order:
        index = index[torch.randperm(inputs, generator=draw)]
        parts["weight_g_idx"] = index.int()
    return parts, ((q - zeros[:, index]).double() * scale.double()[:, index]).to(dtype)


def ct_plain(
    shape: tuple[int, int],
    draw: Draw,
    dtype: torch.dtype = torch.int8,
    scale: str = "channel",
    symmetric: bool = True,
) -> Made:
    """Numbers that are bytes; a scale for all, a row, or a block of 48 rows and 32 inputs."""
    q = whole(draw, -100, 100, *shape).to(torch.int8)
    q = q if dtype == torch.int8 else (q / 8).to(dtype)
    table = {"tensor": (1,), "channel": (shape[0], 1), "block": (-(-shape[0] // 48), -(-shape[1] // 32))}[
        scale
    ]
    table = scales(draw, torch.bfloat16, *table) / 8
    wide = table.double()
    if scale == "block":
        wide = wide.repeat_interleave(48, 0)[: shape[0]].repeat_interleave(32, 1)[:, : shape[1]]
    parts = {"weight": q, "weight_scale": table, "input_scale": torch.ones(1)}
    zeros = torch.zeros(1, 1)
    if not symmetric:
        zeros = whole(draw, -20, 20, *table.shape).to(torch.int8)
        parts["weight_zero_point"] = zeros
    return parts, ((q.double() - zeros.double()) * wide).bfloat16()


def fp8(shape: tuple[int, int], draw: Draw) -> Made:
    """Transformers' own, by blocks of 32 by 32, in a model of bfloat16."""
    q = (whole(draw, -100, 100, *shape) / 8).to(torch.float8_e4m3fn)
    table = scales(draw, torch.float32, shape[0] // 32, shape[1] // 32)
    wide = table.double().repeat_interleave(32, 0).repeat_interleave(32, 1)
    return {"weight": q, "weight_scale_inv": table}, (q.double() * wide).float().bfloat16()


def torchao(
    shape: tuple[int, int], draw: Draw, kind: str = "Int8Tensor", dtype: torch.dtype = torch.bfloat16
) -> Made:
    inputs = shape[1]
    if kind == "Float8Tensor":
        q, scale = (
            (whole(draw, -100, 100, *shape) / 8).to(torch.float8_e4m3fn),
            scales(draw, torch.float32, shape[0], 1),
        )
        return {"_weight_qdata": q, "_weight_scale": scale}, (q.double() * scale.double()).float().to(dtype)
    four = kind == "IntxUnpackedToInt8Tensor"
    q = whole(draw, *((-8, 7) if four else (-128, 127)), *shape).to(torch.int8)
    scale = scales(draw, dtype, shape[0], inputs // 32 if four else 1)
    zero = whole(draw, -3, 3, *scale.shape).to(torch.int8)
    w = (q.double() - by_groups(zero, inputs).double()) * by_groups(scale, inputs).double()
    # the difference is a whole number below 256: exact in bfloat16
    return {"_weight_qdata": q, "_weight_scale": scale, "_weight_zero_point": zero}, w.to(dtype)


def hqq(shape: tuple[int, int], draw: Draw, bits: int = 4, group: int = 32, axis: int = 1) -> Made:
    numbers, dtype = shape[0] * shape[1], torch.bfloat16
    rows, columns = (numbers // group, group) if axis else (group, numbers // group)
    q = whole(draw, 0, 2**bits - 1, rows, columns)
    scale = scales(draw, dtype, *((rows, 1) if axis else (1, columns)))
    zero = (torch.rand(scale.shape, generator=draw) * 2**bits).to(dtype)
    difference = (q.double() - zero.double()).to(dtype)
    w = (difference.double() * scale.double()).to(dtype).view(shape)
    cuts = 10 if bits == 3 else 8 // bits
    even = nn.functional.pad(q, (0, 0, 0, -rows % cuts)).chunk(cuts)
    packed = sum(part << bits * (cuts - 1 - i) for i, part in enumerate(even))
    name = "3bit_32" if bits == 3 else f"{bits}bit_u8"

    def ascii(text: str) -> Tensor:
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    parts = {
        "W_q": packed.to(torch.int32 if bits == 3 else torch.uint8),
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor(shape),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "packing": ascii(name),
        "compute_dtype": ascii("torch.bfloat16"),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
        "quant_scale": torch.tensor(0, dtype=torch.uint8),
        "quant_zero": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, w


# ---- Folders -----------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """A packaging with its options: what makes a matrix, and what config.json says."""

    pack: Callable[..., Made]
    config: dict
    options: dict = field(default_factory=dict)
    families: tuple[Family, ...] = LINEAR
    dtype: torch.dtype = torch.float16  # of what is not packed
    embedding: bool = False  # whether the token embedding and the head are packed too
    transposed: bool = False  # whether GPT-1's matrices are stored [out, in]
    metadata: Callable[[str], str] | None = None  # of a matrix, in the header


def quantized(**fields) -> dict:
    return {"quantization_config": fields}


def ct_config(form: str, **weights) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return quantized(
        quant_method="compressed-tensors", format=form, ignore=["lm_head"], config_groups={"group_0": group}
    )


def torchao_metadata(kind: str) -> Callable[[str], str]:
    data = {"block_size": [1, 32], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    return lambda name: json.dumps({"_type": kind, "_data": data, "_tensor_data_names": ["qdata", "scale"]})


def mlx_config(**fields) -> dict:
    return {"quantization": fields, "quantization_config": fields}


BF16 = {"dtype": torch.bfloat16}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
KINDS: dict[str, Kind] = {
    **{
        f"gptq-{bits}bits": Kind(gptq, quantized(**{**GPTQ_CONFIG, "bits": bits}), {"bits": bits})
        for bits in (2, 3, 4, 8)
    },
    "gptq-symmetric": Kind(gptq, quantized(**GPTQ_CONFIG, sym=True), {"symmetric": True}),
    "gptq-actorder": Kind(gptq, quantized(**GPTQ_CONFIG, desc_act=True), {"act_order": True, "group": 16}),
    "gptq-8bits-symmetric": Kind(
        gptq, quantized(**{**GPTQ_CONFIG, "bits": 8}, sym=True), {"symmetric": True, "bits": 8}
    ),
    "gptq-actorder-32": Kind(gptq, quantized(**GPTQ_CONFIG, desc_act=True), {"act_order": True}),
    "gptq-actorder-64-8bits": Kind(
        gptq,
        quantized(**{**GPTQ_CONFIG, "bits": 8, "group_size": 64}, desc_act=True),
        {"act_order": True, "group": 64, "bits": 8},
    ),
    "gptq-v2": Kind(gptq, quantized(**{**GPTQ_CONFIG, "checkpoint_format": "gptq_v2"}), {"first": False}),
    "gptq-v2-3bits": Kind(
        gptq, quantized(**{**GPTQ_CONFIG, "checkpoint_format": "gptq_v2"}), {"first": False, "bits": 3}
    ),
    "gptq-without-index": Kind(gptq, quantized(**GPTQ_CONFIG), {"with_index": False}),
    "awq": Kind(awq, quantized(quant_method="awq", version="gemm", bits=4), families=(PHI3, PHI)),
    **{
        f"bnb-{kind}{'dq' if nested else ''}": Kind(
            bnb4,
            quantized(quant_method="bitsandbytes"),
            {"kind": kind, "nested": nested},
            EVERY,
            transposed=True,
        )
        for kind in ("nf4", "fp4")
        for nested in (False, True)
    },
    "bnb-nf4-long-blocks": Kind(
        bnb4,
        quantized(quant_method="bitsandbytes"),
        {"blocksize": 4096, "dtype": "bfloat16"},
        EVERY,
        transposed=True,
    ),
    "bnb-int8": Kind(bnb8, quantized(quant_method="bitsandbytes"), {}, EVERY, transposed=True),
    **{
        f"mlx-{bits}bits": Kind(
            mlx,
            mlx_config(bits=bits, group_size=32),
            {"bits": bits},
            (PHI, PHI3),
            torch.bfloat16,
            embedding=True,
        )
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "mlx-float16": Kind(
        mlx,
        mlx_config(bits=4, group_size=64),
        {"group": 64, "dtype": torch.float16},
        (PHI, PHI3),
        embedding=True,
    ),
    "mlx-mxfp4": Kind(
        mxfp4,
        mlx_config(bits=4, group_size=32, mode="mxfp4"),
        {},
        (PHI, PHI3),
        torch.bfloat16,
        embedding=True,
    ),
    **{
        f"ct-int{bits}{'gaps' if gaps else ''}": Kind(
            ct_packed, ct_config("pack-quantized", num_bits=bits), {"bits": bits, "gaps": gaps}, **BF16
        )
        for bits, gaps in ((2, 0), (3, 0), (3, 1), (4, 0), (5, 0), (5, 1), (6, 1), (7, 1), (8, 0))
    },
    "ct-int4-channel": Kind(ct_packed, ct_config("pack-quantized", num_bits=4), {"groups": 1}, **BF16),
    "ct-int4-asymmetric": Kind(
        ct_packed, ct_config("pack-quantized", num_bits=4), {"symmetric": False}, **BF16
    ),
    "ct-int4-actorder": Kind(
        ct_packed, ct_config("pack-quantized", num_bits=4), {"symmetric": False, "act_order": True}, **BF16
    ),
    "ct-int8-plain": Kind(ct_plain, ct_config("int-quantized", num_bits=8), **BF16),
    "ct-int8-asymmetric": Kind(
        ct_plain, ct_config("int-quantized", num_bits=8), {"symmetric": False}, **BF16
    ),
    **{
        f"ct-fp8-{scale}": Kind(
            ct_plain,
            ct_config("float-quantized", num_bits=8, block_structure=[48, 32] if scale == "block" else None),
            {"dtype": torch.float8_e4m3fn, "scale": scale},
            **BF16,
        )
        for scale in ("tensor", "channel", "block")
    },
    "fp8": Kind(
        fp8, {"dtype": "bfloat16", **quantized(quant_method="fp8", weight_block_size=[32, 32])}, **BF16
    ),
    **{
        f"torchao-{name}": Kind(
            torchao,
            quantized(quant_method="torchao"),
            {"kind": kind},
            metadata=torchao_metadata(kind),
            **BF16,
        )
        for name, kind in (
            ("int8", "Int8Tensor"),
            ("int4", "IntxUnpackedToInt8Tensor"),
            ("float8", "Float8Tensor"),
        )
    },
    **{
        f"hqq-{bits}bits-axis{axis}": Kind(
            hqq, quantized(quant_method="hqq"), {"bits": bits, "axis": axis, "group": group}, **BF16
        )
        for bits in (1, 2, 3, 4, 8)
        for axis, group in ((0, 64), (1, 16))
    },
}


def config_of(family: Family) -> dict:
    return {**family.tiny, **SIZES[family.name]}


def write(folder: Path, kind: str, family: Family, seed: int = 0) -> dict[str, Tensor]:
    """A folder of `kind`; returns the plain tensors that it stands for, under the hub's names."""
    model = family.model(dtype=KINDS[kind].dtype, **SIZES[family.name])
    config = {"architectures": [family.class_name()], **config_of(family)}
    return write_model(folder, kind, model, config, seed)


def write_model(folder: Path, kind: str, model: nn.Module, config: dict, seed: int = 0) -> dict[str, Tensor]:
    """A folder of `kind` with the model's shapes; what is packed is drawn anew."""
    made, draw = KINDS[kind], torch.Generator().manual_seed(seed)
    names = packed_names(model, made)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for name, tensor in folders.weights_of_model(model).items():
        if name not in names:
            stored[name] = plain[name] = tensor
            continue
        module = name.removesuffix(".weight")
        turned = made.transposed and names[name] == "Conv1D"
        shape = tuple(reversed(tensor.shape)) if turned else tuple(tensor.shape)
        parts, w = made.pack(shape, draw, **made.options)
        stored |= {f"{module}.{part}": value.contiguous().clone() for part, value in parts.items()}
        plain[name] = w.t().contiguous() if turned else w
        if made.metadata:
            metadata[name] = made.metadata(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **made.config}))
    save_file(stored, folder / "model.safetensors", metadata=metadata)
    return plain


def packed_names(model: nn.Module, made: Kind) -> dict[str, str]:
    """Name of a matrix that is packed -> the class of its module."""
    kinds = ["Linear", "Conv1D", *(["Embedding"] if made.embedding else [])]
    found = {}
    for name, module in model.named_modules():
        is_head = "lm_head" in name and not made.embedding
        if type(module).__name__ in kinds and not is_head and fits(module.weight, made):
            found[f"{name}.weight"] = type(module).__name__
    return found


def fits(weight: Tensor, made: Kind) -> bool:
    """Fuyu's patches are 48 numbers: fewer than a group."""
    return made.pack in (bnb4, bnb8) or all(n % 32 == 0 for n in weight.shape) or made.embedding


def bits_per_weight(parts: dict[str, Tensor], w: Tensor) -> float:
    return 8 * sum(tensor.nbytes for tensor in parts.values()) / math.prod(w.shape)


# ---- A folder that was made from another -------------------------------------------------------------------


def rounded_mlx(w: Tensor, bits: int = 4, group: int = 32) -> dict[str, Tensor]:
    """Of a plain matrix, each number rounded to the nearest that a group of MLX can hold."""
    groups = w.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    scale, bias = ((high - low) / (2**bits - 1)).to(w.dtype), low.to(w.dtype)
    q = ((groups - bias[..., None].float()) / scale[..., None].float()).round().clamp(0, 2**bits - 1)
    return {"weight": words(q.long().flatten(1), bits, torch.uint32), "scales": scale, "biases": bias}


def rounded_bnb8(w: Tensor) -> dict[str, Tensor]:
    absmax = w.float().abs().amax(1)
    q = (w.float() / absmax[:, None] * 127).round().to(torch.int8)
    return {"weight": q, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def pack_folder(
    plain: Path, folder: Path, pack: Callable[..., dict[str, Tensor]], config: dict, edit=None
) -> Path:
    """The checkpoint in `plain` with its layers' matrices packed, and then perhaps edited."""
    from safetensors.torch import load_file

    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if ".layers." in name and tensor.dim() == 2:
            parts = pack(tensor)
            stored |= {f"{name.removesuffix('.weight')}.{part}": t.contiguous() for part, t in parts.items()}
        else:
            stored[name] = tensor
    if edit:
        edit(stored)
    folder.mkdir()
    own = {**json.loads((plain / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(own))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
