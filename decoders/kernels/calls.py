"""The functions of `kernels.c`, called with tensors. The caller sees to it that shapes and dtypes fit."""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Library = ctypes.CDLL
Layer = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # weights (N, ...), scale, zero, bias
# a zero is whole numbers, or floats: then it is a minimum
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
INT4 = 4
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
BLOCKS += ("IQ4_NL", "IQ4_XS", "MXFP4")
p, i, n, f = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
ARGUMENTS = {
    "product": (p, p, i, i, n, n, i),
    "transposed_product": (p, p, p, p, i, n, n, n, n, i),
    "int8_product": (p, p, i, i, n, n, i),
    "int8_weights_product": (p, p, i, i, n, n, i),
    "int8_groups_product": (p, p, i, i, n, n, i),
    "int4_product": (p, p, i, i, n, n, i),
    "bfloat16_product": (p, p, i, n, n, i),
    "w4a8_product": (p, p, i, i, n, n, i),
    "dequantize": (p, i, i, n, i),
    "dequantize_blocks": (i, p, p, i, n, i),
    "whole_numbers_of_blocks": (i, p, p, n, i),
    "rms_norm": (p, p, p, i, f, n, n, i),
    "rotate": (p, p, p, p, i, n, n, n, n, n, n, n, n, n, i),
    "to_int8": (p, i, n, p, p, n, n, i),
    "to_int4": (p, i, n, p, p, p, n, n, i),
    "run_plan": (p, p, i),
    "one_query": (p, p, p, p, n, n, p, i, i, f, n, n, n, n, n, n, n, n, n, n, n, i),
}  # fmt: skip


def declare(lib: Library) -> Library:
    """`lib` with the types of its functions. AttributeError where one is missing."""
    for name, arguments in ARGUMENTS.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    lib.run_plan.restype = ctypes.c_int
    return lib


def pointer(t: Tensor | None) -> int | None:
    """Where the numbers of `t` lie. RuntimeError where they have been freed."""
    if t is None:
        return None
    address = t.data_ptr()
    if not address and t.numel():
        raise RuntimeError("the memory of a weight has been freed")
    return address


def results(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], ctypes.Array]:
    """Room for the (..., N) of each layer, and what `kernels.c` calls a Layer, one after the other."""
    ys = [x.new_empty(*x.shape[:-1], layer[0].shape[0]) for layer in layers]
    fields: list[int | None] = []
    for layer, y in zip(layers, ys, strict=True):
        fields += c_layer(layer, pointer(y))
    return ys, (p * len(fields))(*fields)


def c_layer(layer: Layer, y: int | None) -> list[int | None]:
    """The fields of `kernels.c`'s Layer."""
    w, scale, zero, bias = layer
    return [*map(pointer, (w, scale, zero, bias)), y, w.shape[0], w.stride(0), *groups(w, scale, zero)]


def groups(w: Tensor, scale: Tensor | None, zero: Tensor | None) -> tuple[int, int, int]:
    """What numbers scale and zero are, and the power of two: a group has 32 times as many inputs."""
    scale_kind = 0 if scale is None else KINDS[scale.dtype]
    if scale is None or scale.dim() == 1:
        return scale_kind, 0, 0
    zero_kind = 0 if zero is None else KINDS.get(zero.dtype, KINDS[torch.int8])  # uint8 below 16 is int8 too
    return scale_kind, zero_kind, group_of(parts_of(w), scale.shape[1]).bit_length() - 1


def parts_of(w: Tensor) -> int:
    """Of how many times 32 inputs a row of 8 or 4 bits is made."""
    return w.shape[1] // (32 if w.dtype is torch.int8 else 16)


def group_of(parts: int, groups: int) -> int:
    """How many of `parts` times 32 inputs share a scale, a power of two, where a row has so many groups."""
    return 1 << ((parts - 1) // groups).bit_length()


def product(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: x (..., K) with w (N, K) alike, whose rows may be apart."""
    return call_product(lib.product, x, layers)


def call_product(function: Callable, x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    x, (ys, fields) = x.contiguous(), results(x, layers)
    function(
        pointer(x),
        fields,
        len(ys),
        KINDS[x.dtype],
        x.numel() // x.shape[-1],
        x.shape[-1],
        torch.get_num_threads(),
    )
    return ys


def transposed_product(lib: Library, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """(..., N): x (..., K) with w (N, K) alike, which is stored transposed: each column contiguous."""
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], w.shape[0])
    lib.transposed_product(
        pointer(x),
        pointer(w),
        pointer(bias),
        pointer(y),
        KINDS[x.dtype],
        x.numel() // x.shape[-1],
        *w.shape,
        w.stride(1),
        torch.get_num_threads(),
    )
    return y


def int8_product(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: each row of x rounded to 8 bits, with w int8 (N, K)."""
    return call_product(lib.int8_product, x, layers)


def int8_weights_product(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: each row of x rounded to 24 bits, with w int8 (N, K)."""
    return call_product(lib.int8_weights_product, x, layers)


def int8_groups_product(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: x (..., K) with w int8 (N, K), a scale and perhaps a zero for each group."""
    return call_product(lib.int8_groups_product, x, layers)


def int4_product(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: x (..., K) with w uint8 (N, K / 2), a scale and a zero for each group, rows padded."""
    return call_product(lib.int4_product, x, layers)


def bfloat16_product(lib: Library, x: Tensor, layer: Layer) -> Tensor:
    """(..., N): many rows of x (..., K) with weights of 8 or 4 bits."""
    x, (ys, fields) = x.contiguous(), results(x, [layer])
    kind = KINDS.get(layer[0].dtype, INT4)
    rows = x.numel() // x.shape[-1]
    lib.bfloat16_product(pointer(x), fields, kind, rows, x.shape[-1], torch.get_num_threads())
    return ys[0]


def w4a8_product(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: many rows of x (..., K), rounded to 8 bits in groups of 256, w as in `int4_product`."""
    return call_product(lib.w4a8_product, x, layers)


def dequantize(lib: Library, layer: Layer, inputs: int, dtype: torch.dtype) -> Tensor:
    """(N, inputs): what 8 or 4 bits stand for."""
    w = torch.empty(layer[0].shape[0], inputs, dtype=dtype)
    fields = c_layer(layer, pointer(w))
    kind = KINDS.get(layer[0].dtype, INT4)
    lib.dequantize((p * len(fields))(*fields), kind, KINDS[dtype], inputs, torch.get_num_threads())
    return w


def dequantize_blocks(lib: Library, blocks: Tensor, kind: str, numbers: Tensor) -> None:
    """Fills `numbers` with what GGUF's blocks (n, bytes) of a type stand for."""
    lib.dequantize_blocks(
        BLOCKS.index(kind),
        pointer(blocks),
        pointer(numbers),
        KINDS[numbers.dtype],
        len(blocks),
        torch.get_num_threads(),
    )


def whole_numbers(lib: Library, blocks: Tensor, kind: str, q: Tensor) -> None:
    """Fills `q` with the numbers of blocks (n, bytes) of 8 bits, or of 4 in pairs."""
    threads = torch.get_num_threads()
    lib.whole_numbers_of_blocks(BLOCKS.index(kind), pointer(blocks), pointer(q), len(blocks), threads)


def to_int8(lib: Library, w: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty(w.shape, dtype=torch.int8), torch.empty(w.shape[0])
    lib.to_int8(
        pointer(w), KINDS[w.dtype], w.stride(0), pointer(q), pointer(scale), *w.shape, torch.get_num_threads()
    )
    return q, scale


def to_int4(lib: Library, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, blocks = w.shape[0], -(-w.shape[1] // 128)
    q, zero = (torch.empty(rows, blocks * size, dtype=torch.uint8) for size in (64, 4))
    scale = torch.empty(rows, blocks * 4, dtype=torch.float16)
    lib.to_int4(
        pointer(w),
        KINDS[w.dtype],
        w.stride(0),
        pointer(q),
        pointer(scale),
        pointer(zero),
        *w.shape,
        torch.get_num_threads(),
    )
    return q, scale, zero


def rms_norm(lib: Library, x: Tensor, w: Tensor, eps: float) -> Tensor:
    """x (..., C) / sqrt(mean(x^2) + eps), rounded, times w (C,) of the same dtype."""
    x, w = x.contiguous(), w.contiguous()
    y = torch.empty_like(x)
    lib.rms_norm(
        pointer(x),
        pointer(w),
        pointer(y),
        KINDS[x.dtype],
        eps,
        x.numel() // len(w),
        len(w),
        torch.get_num_threads(),
    )
    return y


def rotate(lib: Library, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), each row whole, by tables (B or 1, 1, T, R) alike."""
    T, R, y = x.shape[2], cos.shape[3], x.new_empty(x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    lib.rotate(
        pointer(x),
        pointer(cos),
        pointer(sin),
        pointer(y),
        KINDS[x.dtype],
        *x.shape,
        R,
        *x.stride()[:3],
        0 if cos.shape[0] == 1 else T * R,
        torch.get_num_threads(),
    )
    return y


def one_query(lib: Library, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, 1, D) of q alike; k, v (B, K, S, D), their rows whole; mask (B or 1, H or 1, 1, S)."""
    (B, H, _, D), (K, S) = q.shape, k.shape[1:3]
    q, y, steps = q.contiguous(), q.new_empty(B, H, 1, D), [0, 0]
    if mask is not None:
        mask = mask.float().contiguous()
        sizes = zip(mask.shape[:2], mask.stride()[:2], strict=True)
        steps = [0 if size == 1 else step for size, step in sizes]
    lib.one_query(
        pointer(q),
        pointer(k),
        pointer(v),
        pointer(mask),
        *steps,
        pointer(y),
        KINDS[q.dtype],
        KINDS[k.dtype],
        scale,
        B,
        K,
        H // K,
        S,
        D,
        *k.stride()[:3],
        *v.stride()[:3],
        torch.get_num_threads(),
    )
    return y
