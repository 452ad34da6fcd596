"""Attention, rotary embedding and the projections q, k, v for inference on a CPU.

- q, k and v of three layers: one call of `kernels.c`.
- One query: `kernels.c`. Without it, in half precision, the formula in float32 (the fused kernel takes three
  times as long); with grouped heads (GQA) the heads of a group become rows of one product, where PyTorch
  would copy the keys.
- A sliding window over many queries: in blocks, so that no score outside of the window is computed.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import calls, native
from .conditions import NATIVE_DTYPES, is_dense_cpu, must_run_plain_ops
from .int8_cache import Rows
from .linear import fits, is_few_rows, linear_forward
from .quantized import PRODUCTS, Quantized

# ---- q, k and v --------------------------------------------------------------------------------------------


def qkv(self: Any, x: Tensor) -> list[Tensor]:
    """q, k and v (B, T, H D) and (B, T, K D) twice, of an attention with three layers: one call for all."""
    layers = [self.q_proj, self.k_proj, self.v_proj]
    observed = must_run_plain_ops() or nn.modules.module._has_any_global_hook()
    lib = None if observed else native.library()
    products = [native_product(layer, x) for layer in layers] if lib else []
    functions = {product[0] for product in products if product}
    if all(products) and len(functions) == 1:
        return functions.pop()(lib, x, *(product[1] for product in products if product))
    return [layer(x) for layer in layers]


def native_product(layer: Any, x: Tensor) -> tuple[Callable, calls.Layer] | None:
    """The call that multiplies x by this layer, and the layer's tensors. None where `kernels.c` is not the
    fastest way, a hook looks into the layer, or the layer is somebody else's."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if is_own(layer) and layer.supports(x):
        return PRODUCTS[layer.kind], layer.stored(x.dtype)
    if type(layer) is nn.Linear and is_forward(layer, linear_forward):
        weight: Any = layer._parameters["weight"]
        bias: Any = layer._parameters["bias"]
        if fits(x, weight, bias) and is_few_rows(x, weight) and weight.stride(1) == 1:
            return calls.product, (weight, None, None, bias)
    return None


def is_own(layer: Any) -> bool:
    """Whether a layer is of 8 or 4 bits, with its own forward, and takes its inputs in their order."""
    return type(layer) is Quantized and "forward" not in vars(layer) and "order" not in layer._buffers


def is_forward(module: nn.Module, function: Callable) -> bool:
    """Whether `hooks.prepare` has put `function` there as `forward`, and nobody anything since."""
    return getattr(vars(module).get("forward"), "__func__", None) is function


# ---- Rotary embedding --------------------------------------------------------------------------------------


def rotate(plain: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `plain`, the model file's own, bit for bit: one operation, where PyTorch's operators are six."""
    lib = native.library() if can_rotate(x, cos, sin) and not must_run_plain_ops() else None
    return calls.rotate(lib, x, cos, sin) if lib else plain(x, cos, sin)


def can_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """x (B, H, T, D) with cos and sin (B or 1, 1, T, R), R even, D contiguous."""
    if x.dim() != 4 or cos.shape != sin.shape or x.stride(3) != 1 or x.dtype not in NATIVE_DTYPES:
        return False
    B, _, T, D = x.shape
    R = cos.shape[3]
    shapes_fit = cos.shape[:3] in ((1, 1, T), (B, 1, T)) and R <= D and R % 2 == 0
    return shapes_fit and is_dense_cpu(x, cos, sin)


# ---- Attention ---------------------------------------------------------------------------------------------


def window_of(model: nn.Module) -> int | None:
    """Positions that a local layer sees."""
    config = getattr(model, "config", None)
    return getattr(config, "sliding_window", None) or getattr(config, "window_size", None)


def attention(
    plain: Callable,
    window: int | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    output_attentions: bool = False,
    *rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `plain`, the model file's own: q (B, H, T, D), k and v (B, K, S, D), `mask` additive."""
    if isinstance(k, Rows) and isinstance(v, Rows):
        lib = None if output_attentions or any(x is not None for x in rest) else native.library()
        if lib and q.dtype in NATIVE_DTYPES and is_dense_cpu(q):
            return calls.one_query(lib, q, k.rows, v.rows, mask, scale), None
        k, v = k.dequantize(), v.dequantize()
    wants_plain = output_attentions or dropout or any(x is not None for x in rest)
    if wants_plain or must_run_plain_ops() or not is_dense_cpu(q, k, v):
        return plain(q, k, v, mask, scale, dropout, output_attentions, *rest)
    T = q.shape[2]
    if T == 1 and (y := one_query(q, k, v, mask, scale)) is not None:
        return y, None
    if window and T > window and mask is not None and hides_older(mask, window):
        return windowed_attention(plain, window, q, k, v, mask, scale), None
    return plain(q, k, v, mask, scale, dropout, output_attentions, *rest)


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """(B, H, 1, D) by the fastest way; None where that is the model file's own."""
    (B, H, T, D), K = q.shape, k.shape[1]
    contiguous_rows = k.stride(3) == v.stride(3) == 1
    if q.dtype in NATIVE_DTYPES and contiguous_rows and (lib := native.library()):
        return calls.one_query(lib, q, k, v, mask, scale)
    if q.dtype.itemsize == 2:
        return one_query_in_float32(q, k, v, mask, scale)
    if K < H and (mask is None or mask.shape[1] == 1):
        grouped = q.reshape(B, K, H // K, D)
        return F.scaled_dot_product_attention(grouped, k, v, mask, scale=scale).view(B, H, T, D)
    return None


def hides_older(mask: Tensor, window: int) -> bool:
    """Whether no query sees a key that is `window` or more positions before it, as without windows it may."""
    T, S = mask.shape[2:]
    older = torch.ones(T, S, dtype=torch.bool).tril(S - T - window)
    return bool((torch.isneginf(mask) | ~older).all())


def windowed_attention(
    plain: Callable, window: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """(B, H, T, D) in blocks of `window` queries, which need 2 * window - 1 keys at most."""
    T, S = mask.shape[2:]
    blocks = []
    for start in range(0, T, window):
        queries = slice(start, min(start + window, T))
        keys = slice(max(0, S - T + start - window + 1), S - T + queries.stop)
        visible = k[:, :, keys], v[:, :, keys], mask[:, :, queries, keys]
        blocks.append(plain(q[:, :, queries], *visible, scale)[0])
    return torch.cat(blocks, dim=2)


def one_query_in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, 1, D) by the formula. Heads of a group (GQA) are rows of one product.

    The keys of a few heads, then their values, become float32 in `scratch`, which is the same memory for all
    layers and steps: asking the system for new memory would cost more than the copying.
    """
    (B, H, _, D), (K, S) = q.shape, k.shape[1:3]
    q, y = q.reshape(B, K, H // K, D), q.new_empty(B, K, H // K, D)
    if mask is not None:
        by_head = mask.shape[1] == H
        mask = mask.expand(B, H, 1, S).view(B, K, H // K, S) if by_head else mask.expand(B, 1, 1, S)
    memory = scratch(2**19, S * D)
    step = memory.numel() // (S * D)
    for b in range(B):
        for start in range(0, K, step):
            heads = slice(start, start + step)
            fp32 = memory[: k[b, heads].numel()].view(-1, S, D)
            scores = q[b, heads].float() @ fp32.copy_(k[b, heads]).transpose(1, 2) * scale
            if mask is not None:
                scores = scores + (mask[b, heads] if mask.shape[1] == K else mask[b])
            y[b, heads] = (scores.softmax(-1) @ fp32.copy_(v[b, heads])).to(q.dtype)
    return y.view(B, H, 1, D)


MEMORY = threading.local()


def scratch(wanted: int, needed: int) -> Tensor:
    """At least `needed` float32 numbers of memory, kept for this thread's next call."""
    if not hasattr(MEMORY, "numbers") or len(MEMORY.numbers) < needed:
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            MEMORY.numbers = torch.empty(max(wanted, needed), device="cpu", dtype=torch.float32)
    return MEMORY.numbers
