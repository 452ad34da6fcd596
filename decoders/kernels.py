"""Products and attention that are faster on CPUs than PyTorch's default, put under a loaded model.

    kernels.prepare(model)      # `weights.load` ends with it
    kernels.plain(model)        # takes it back

`prepare` gives each `nn.Linear`, GPT-1's `Conv1D` and each attention module another way to compute the same,
for inference on a CPU. Wherever PyTorch has to see the plain operations (autograd, autocast, forward AD,
torch.func, a compiler, export, tracing, tensor subclasses, dispatch modes, other devices) it gets them: there
a prepared model does exactly what a plain one does. No global setting is touched: threads may share a model.

- float32: oneDNN's product takes half the time of MKL's, which `F.linear` calls, for few rows, and less for
  many (measured on an AMD EPYC).
- bfloat16, one row: PyTorch's own row kernel takes two thirds of the time of oneDNN's, which `F.linear`
  calls. No operator leads to it as long as oneDNN is on, and that switch is process-wide. So the kernel is
  taken out of libtorch by its name, which states its argument types, and believed only after it has given the
  right numbers for a small product. Where it is not found `F.linear` stays.
- attention of one query: in half precision the fused kernel takes three times as long as the formula; heads
  that share keys become rows of one product, where PyTorch would copy the keys.
- attention with a window: in blocks, so that no score outside of it is computed.
"""

import ctypes
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

# ---- When to leave everything to PyTorch -------------------------------------------------------------------


def is_followed() -> bool:
    """Whether somebody must see the plain operations: autograd, a compiler, a tracer, a transform, a mode."""
    return (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu") or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _get_current_dispatch_mode() is not None
    )  # fmt: skip


def is_simple(*tensors: Tensor) -> bool:
    """Dense tensors on the CPU, of one dtype: no subclass such as DTensor or torchao's, no fake ones."""
    dtype, strided = tensors[0].dtype, torch.strided
    return all(
        type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.layout is strided and t.dtype is dtype
        for t in tensors
    )


# ---- Linear ------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by the kernel that reads the weights fastest. x (..., in), weight (out, in), bias (out,)."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if is_followed() or not is_simple(*given) or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight, bias)
    if x.dtype is torch.float32 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if x.dtype is torch.bfloat16 and x.numel() == x.shape[-1] and weight.stride(1) == 1 and row_kernel():
        y = row_product(x, weight)
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """(..., out) of one bfloat16 row x (..., in), summed up in float32."""
    x, (n, k) = x.contiguous(), weight.shape
    y = x.new_empty(*x.shape[:-1], n)
    one, zero = 0x3F80, 0  # in bfloat16: y = 1 * weight x + 0 * y
    row_kernel()(k, n, one, weight.data_ptr(), weight.stride(0), x.data_ptr(), 1, zero, y.data_ptr(), 1)
    return y


ROW_KERNEL = ("_ZN2at6native12DispatchStubIPFviiN3c108BFloat16EPKS3_iS5_iS3_PS3_iE"
              "NS0_42bf16_gemv_trans_stub_DECLARE_DISPATCH_typeEE{}E")


@cache
def row_kernel() -> Callable | None:
    """void (int m, int n, BFloat16 alpha, const BFloat16 *a, int lda, const BFloat16 *x, int incx,
    BFloat16 beta, BFloat16 *y, int incy) out of libtorch; None where it is not to be had or is wrong."""
    names = {"AVX512": ("6AVX512", "4AVX2"), "AVX2": ("4AVX2",)}
    i, half, p = ctypes.c_int, ctypes.c_uint16, ctypes.c_void_p
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        capability = torch.backends.cpu.get_cpu_capability()
        found = [p.in_dll(library, ROW_KERNEL.format(name)).value for name in names.get(capability, ())]
    except (OSError, ValueError):
        return None
    address = next(filter(None, found), None)
    kernel = ctypes.CFUNCTYPE(None, i, i, half, p, i, p, i, half, p, i)(address) if address else None
    return kernel if kernel and gives_the_right_numbers(kernel) else None


def gives_the_right_numbers(kernel: Callable) -> bool:
    """Products of small whole numbers, which are exact in any order."""
    a = (torch.arange(7 * 70).view(7, 70) % 5 - 2).to(torch.bfloat16)[:, :67]
    x, y = (torch.arange(67) % 3 - 1).to(torch.bfloat16), torch.full((7,), 9.0, dtype=torch.bfloat16)
    kernel(67, 7, 0x3F80, a.data_ptr(), 70, x.data_ptr(), 1, 0, y.data_ptr(), 1)
    return bool((y.double() == (a.double() * x.double()).sum(1)).all())


def forward(self: nn.Module, x: Tensor) -> Tensor:
    """Of a prepared nn.Linear. By its name a pickled module finds its own `forward`, and is plain then."""
    return linear(x, self.weight, self.bias)


def turned_forward(self: nn.Module, x: Tensor) -> Tensor:
    """Of a prepared Conv1D, whose matrix is stored [in, out]."""
    return linear(x, self.weight.t(), self.bias)


turned_forward.__name__ = "forward"

# ---- Attention ---------------------------------------------------------------------------------------------


def attention(plain: Callable, window: int | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
              scale: float, dropout: float = 0.0, whole: bool = False, head_mask: Tensor | None = None):
    """As `plain`, the model file's own: one half-precision query by the formula, heads that share keys as
    rows of one product, a window in blocks."""
    (B, H, T, D), K = q.shape, k.shape[1]
    if not (whole or dropout or is_followed()) and is_simple(q, k, v):
        if T == 1 and q.dtype.itemsize == 2:
            return one_query_attention(q, k, v, bias, scale), None
        if T == 1 and K < H and (bias is None or bias.shape[1] == 1):
            rows = q.reshape(B, K, H // K, D)
            return F.scaled_dot_product_attention(rows, k, v, bias, scale=scale).view(B, H, T, D), None
        if window and T > window and bias is not None and hides_older(bias, window):
            return window_attention(plain, window, q, k, v, bias, scale), None
    return plain(q, k, v, bias, scale, dropout, whole, head_mask)


def hides_older(bias: Tensor, window: int) -> bool:
    """Whether no query sees a key that is `window` or more positions before it, as without windows it may."""
    T, S = bias.shape[2:]
    older = torch.ones(T, S, dtype=torch.bool).tril(S - T - window)
    return bool((torch.isneginf(bias) | ~older).all())


def window_attention(plain: Callable, window: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor,
                     scale: float) -> Tensor:
    """(B, H, T, D) in blocks of `window` queries, which need 2 * window - 1 keys at most."""
    T, S = bias.shape[2:]
    blocks = []
    for start in range(0, T, window):
        queries = slice(start, min(start + window, T))
        keys = slice(max(0, S - T + start - window + 1), S - T + queries.stop)
        near = k[:, :, keys], v[:, :, keys], bias[:, :, queries, keys]
        blocks.append(plain(q[:, :, queries], *near, scale)[0])
    return torch.cat(blocks, dim=2)


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(B, H, 1, D). Heads that share keys are rows of one product.

    The keys of a few heads, then their values, become float32 in `scratch`, which is the same memory for all
    layers and steps: asking the system for new memory would cost more than the copying.
    """
    (B, H, _, D), (K, S) = q.shape, k.shape[1:3]
    q, y = q.reshape(B, K, H // K, D), q.new_empty(B, K, H // K, D)
    if bias is not None:
        by_head = bias.shape[1] == H
        bias = bias.expand(B, H, 1, S).view(B, K, H // K, S) if by_head else bias.expand(B, 1, 1, S)
    memory = scratch(2**19, S * D)
    step = memory.numel() // (S * D)
    for b in range(B):
        for start in range(0, K, step):
            heads = slice(start, start + step)
            wide = memory[: k[b, heads].numel()].view(-1, S, D)
            scores = q[b, heads].float() @ wide.copy_(k[b, heads]).transpose(1, 2) * scale
            if bias is not None:
                scores = scores + (bias[b, heads] if bias.shape[1] == K else bias[b])
            y[b, heads] = (scores.softmax(-1) @ wide.copy_(v[b, heads])).to(q.dtype)
    return y.view(B, H, 1, D)


MEMORY = threading.local()


def scratch(wanted: int, needed: int) -> Tensor:
    """At least `needed` float32 numbers of memory, kept for this thread's next call."""
    if not hasattr(MEMORY, "numbers") or len(MEMORY.numbers) < needed:
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            MEMORY.numbers = torch.empty(max(wanted, needed), device="cpu", dtype=torch.float32)
    return MEMORY.numbers


# ---- Under a model -----------------------------------------------------------------------------------------


def prepare(model: nn.Module) -> nn.Module:
    """Put the faster ways under `model`, in place. Parameters, names and types of modules stay."""
    config = getattr(model, "config", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's, such as a hook's
            continue
        if type(module) is nn.Linear:
            module.forward = MethodType(forward, module)
        elif type(module).__name__ == "Conv1D":
            module.forward = MethodType(turned_forward, module)
        elif hasattr(type(module), "attend"):
            module.attend = partial(attention, type(module).attend, window)
    return model


def plain(model: nn.Module) -> nn.Module:
    """Take back what `prepare` did, in place."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in (forward, turned_forward):
            del module.forward
        vars(module).pop("attend", None)
    return model
