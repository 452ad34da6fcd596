"""Products and attention that are faster on CPUs than PyTorch's default, and weights of 8 and 4 bits, put
under a loaded model.

    kernels.prepare(model)              # `weights.load` ends with it
    kernels.plain(model)                # takes it back
    kernels.quantize(model, "int4")     # for good: a third of the memory, and half the time of a step
    kernels.error(model, ids, "int4")   # what that costs

`prepare` gives each `nn.Linear`, GPT-1's `Conv1D`, Phi-3's `RMSNorm`, and what an attention module calls
`qkv`, `rotate` and `attend`, another way to compute the same, for inference on a CPU. Wherever PyTorch
has to see the plain operations (autograd, forward AD, autocast, torch.func, a compiler, export, tracing,
tensor subclasses, dispatch modes, other devices) it gets them: there a prepared model does exactly what a
plain one does. No global setting is touched: threads may share a model.

- up to 16 rows, q, k and v at once, the rotation, and attention of one query: `kernels.c`, which reads memory
  about as fast as it can be read, where it can be compiled (`native.py`). Elsewhere:
- bfloat16, one row: PyTorch's own row kernel takes two thirds of the time of oneDNN's, which `F.linear`
  calls. No operator leads to it as long as oneDNN is on, and that switch is process-wide. So the kernel is
  taken out of libtorch by its name, which states its argument types, and believed only after it has given the
  right numbers for a small product. Where it is not found `F.linear` stays.
- attention of one query: in half precision the fused kernel takes three times as long as the formula; heads
  that share keys become rows of one product, where PyTorch would copy the keys.
- float32: oneDNN's product takes half the time of MKL's, which `F.linear` calls, for few rows, and less for
  many (measured on an AMD EPYC).
- attention with a window: in blocks, so that no score outside of it is computed.
"""

import copy
import ctypes
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import native

FEW = 16  # rows up to which `kernels.c` is faster than oneDNN
SERVED = (torch.float32, torch.bfloat16, torch.float16)  # which it takes

# ---- When to leave everything to PyTorch -------------------------------------------------------------------


def is_followed() -> bool:
    """Whether somebody must see the plain operations: autograd, a compiler, a tracer, a transform, a mode."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_traced()


def is_traced() -> bool:
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0
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
    if is_followed() or not fits(x, weight, bias):
        return F.linear(x, weight, bias)
    if is_few(x, weight) and (lib := native.library()):
        if weight.stride(1) != 1:
            return native.product_of_columns(lib, x, weight, bias)
        return native.product_of_rows(lib, x, (weight, None, None, bias))[0]
    if x.dtype is torch.float32 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    one_row = x.numel() == weight.shape[1] > 0 and weight.stride(1) == 1
    if x.dtype is torch.bfloat16 and one_row and row_kernel():
        y = row_product(x, weight)
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    simple = is_simple(x, weight) if bias is None else is_simple(x, weight, bias)
    return simple and x.dim() > 0 and x.shape[-1] == weight.shape[1]


def is_few(x: Tensor, weight: Tensor) -> bool:
    """Whether `kernels.c` takes this product, and is the fastest way."""
    return 0 < x.numel() <= FEW * weight.shape[1] and 1 in weight.stride() and x.dtype in SERVED


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """(..., out) of one bfloat16 row x (..., in), summed up in float32."""
    x, (n, k) = x.contiguous(), weight.shape
    y = x.new_empty(*x.shape[:-1], n)
    one, zero = 0x3F80, 0  # in bfloat16: y = 1 * weight x + 0 * y
    row_kernel()(k, n, one, weight.data_ptr(), weight.stride(0), x.data_ptr(), 1, zero, y.data_ptr(), 1)
    return y


ROW_KERNEL = (
    "_ZN2at6native12DispatchStubIPFviiN3c108BFloat16EPKS3_iS5_iS3_PS3_iE"
    "NS0_42bf16_gemv_trans_stub_DECLARE_DISPATCH_typeEE{}E"
)


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


def normed_forward(self: nn.Module, x: Tensor) -> Tensor:
    """Of a prepared RMSNorm: one pass over each row, where PyTorch's operators make six."""
    weight = self.weight
    serves = is_simple(x, weight) and x.shape[-1:] == weight.shape and x.dtype in SERVED
    lib = native.library() if serves and not is_followed() else None
    return native.rms_norm(lib, x, weight, self.eps) if lib else type(self).forward(self, x)


turned_forward.__name__ = normed_forward.__name__ = "forward"


def qkv(self: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a prepared attention whose q, k and v are layers of their own: one call for the three, which stay
    where they are."""
    layers = self.q_proj, self.k_proj, self.v_proj
    watched = is_followed() or nn.modules.module._has_any_global_hook()
    lib = None if watched else native.library()
    found = [native_product(layer, x) for layer in layers] if lib else [None]
    if all(found) and len({product for product, _ in found}) == 1:
        return found[0][0](lib, x, *(stored for _, stored in found))
    return [layer(x) for layer in layers]


def native_product(layer: nn.Module, x: Tensor) -> tuple[Callable, native.Layer] | None:
    """What takes x with this layer, and what of the layer. None where `kernels.c` is not the fastest way,
    somebody looks into the layer, or it is somebody else's."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if type(layer) is Quantized and "forward" not in vars(layer) and layer.serves(x):
        return PRODUCTS[layer.kind], layer.stored(x.dtype)
    if type(layer) is nn.Linear and runs(layer, forward):
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if fits(x, weight, bias) and is_few(x, weight) and weight.stride(1) == 1:
            return native.product_of_rows, (weight, None, None, bias)
    return None


def runs(module: nn.Module, ours: Callable) -> bool:
    """Whether `prepare` has put `ours` there, and nobody anything since."""
    return getattr(vars(module).get("forward"), "__func__", None) is ours


# ---- Attention ---------------------------------------------------------------------------------------------


def rotation(plain: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `plain`, the model file's own, bit for bit: one operation, where PyTorch's operators are six."""
    alike = x.dim() == 4 and cos.shape == sin.shape and cos.shape[1:3] == (1, x.shape[2]) and x.stride(3) == 1
    turns = alike and cos.shape[0] in (1, x.shape[0]) and cos.shape[3] <= x.shape[3] and cos.shape[3] % 2 == 0
    serves = turns and not is_followed() and is_simple(x, cos, sin) and x.dtype in SERVED
    lib = native.library() if serves else None
    return native.rotate(lib, x, cos, sin) if lib else plain(x, cos, sin)


def attention(
    plain: Callable,
    window: int | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    whole: bool = False,
    head_mask: Tensor | None = None,
):
    """As `plain`, the model file's own: one query by `kernels.c` or by the formula, heads that share keys as
    rows of one product, a window in blocks."""
    (B, H, T, D), K = q.shape, k.shape[1]
    if not (whole or dropout or is_followed()) and is_simple(q, k, v):
        native_serves = T == 1 and q.dtype in SERVED and k.stride(3) == v.stride(3) == 1
        if native_serves and (lib := native.library()):
            return native.one_query(lib, q, k, v, bias, scale), None
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


def window_attention(
    plain: Callable, window: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
) -> Tensor:
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


# ---- Weights of 8 and 4 bits -------------------------------------------------------------------------------

GROUP, BLOCK = 32, 128  # inputs that share a scale in 4 bits; whole rows are filled up to
CHUNK = 2**23  # numbers that are made of 8 or 4 bits at a time
LONGEST = 2**16  # inputs whose products of 255 by 127 add up to less than 2**31
VERSION = 1  # of the bits in a folder: another reader is needed where it changes
KINDS = {
    "int8": "a scale for each row of the weight; x is rounded to 8 bits too, each row with its own scale",
    "int8-weights": "a scale for each row of the weight; x stays as it is, up to its 24th bit",
    "int4": "a scale and a zero for each 32 inputs of the weight; x stays as it is",
}


PRODUCTS = {
    "int8": native.int8_product,
    "int8-weights": native.int8_product_of_digits,
    "int4": native.int4_product,
}


class Quantized(nn.Module):
    """A linear layer of 8 or 4 bits: `qweight` and `scale` (out,), or for 4 bits `qweight` with two numbers a
    byte, the first in the lower half, `scale` in float16 and `zero`, for 32 inputs each; rows are filled up
    to 128 inputs.

        int8    w[n, k] = qweight[n, k] * scale[n]
        int4    w[n, k] = (qweight[n, k] - zero[n, k // 32]) * scale[n, k // 32]

    The sums of "int8" are whole numbers, the same on every processor.
    """

    weight = None  # is not kept; `whole()` computes it

    def __init__(self, kind: str, in_features: int, out_features: int, bias: nn.Parameter | None):
        super().__init__()
        self.kind, self.in_features, self.out_features, self.bias = kind, in_features, out_features, bias
        blocks = -(-in_features // BLOCK)
        if kind == "int4":
            groups = blocks * BLOCK // GROUP
            self.register_buffer("qweight", torch.empty(out_features, blocks * BLOCK // 2, dtype=torch.uint8))
            self.register_buffer("scale", torch.empty(out_features, groups, dtype=torch.float16))
            self.register_buffer("zero", torch.empty(out_features, groups, dtype=torch.uint8))
        else:
            self.register_buffer("qweight", torch.empty(out_features, in_features, dtype=torch.int8))
            self.register_buffer("scale", torch.empty(out_features))

    @classmethod
    def like(cls, layer: nn.Module, kind: str) -> "Quantized":
        """Room for `layer`, with its bias; its weights are still to be taken over."""
        outputs, inputs = matrix(layer, layer.weight).shape
        with torch.device("meta"):
            return cls(kind, inputs, outputs, layer.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}, bias={self.bias is not None}"

    def train(self, mode: bool = True) -> "Quantized":
        if mode:
            raise ValueError(f"weights of {self.kind} cannot be trained: load the model without quantize")
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Quantized":
        """To another device; the dtypes are those of the format, and `model.half()` leaves them alone."""
        bits, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)
        for name, t in bits.items():
            moved = fn(t)
            self._buffers[name] = moved if moved.dtype == t.dtype else t.to(moved.device)
        return self

    def fill(self, w: Tensor, device: str | torch.device = "cpu") -> "Quantized":
        """Take over w (out, in), in place."""
        w = w.detach()
        if is_simple(w) and w.dtype in SERVED and (lib := native.library()):
            w = w if w.stride(1) == 1 else w.contiguous()
            made = (native.to_int4 if self.kind == "int4" else native.to_int8)(lib, w)
        else:
            made = (to_int4 if self.kind == "int4" else to_int8)(w)
        for name, t in zip(("qweight", "scale", "zero"), made, strict=False):
            setattr(self, name, t.to(device))
        if not bool(self.scale.isfinite().all()):
            raise ValueError(f"weights that are NaN or infinite cannot be made {self.kind}")
        return self

    def whole(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """(rows, in): what the bits stand for."""
        q, scale = self.qweight[rows], self.scale[rows]
        simple = q.is_cpu and dtype in SERVED and not is_traced()
        lib = native.library() if simple else None
        if self.kind != "int4":
            return native.int8_rows(lib, q, scale, dtype) if lib else (q * scale[:, None]).to(dtype)
        if lib:
            return native.int4_rows(lib, q, scale, self.zero[rows], self.in_features, dtype)
        pairs = torch.stack((q & 15, q >> 4), -1).view(*scale.shape, GROUP)
        w = (pairs.float() - self.zero[rows, :, None].float()) * scale[..., None].float()
        return w.flatten(1)[:, : self.in_features].to(dtype)

    def stored(self, dtype: torch.dtype) -> native.Layer:
        """Bits, scale, zero and bias. Out of the dictionaries: finding them by `self.` takes longer than a
        small product."""
        bits, bias = self._buffers, self._parameters.get("bias")
        bias = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
        return bits["qweight"], bits["scale"], bits.get("zero"), bias

    def serves(self, x: Tensor) -> bool:
        """Whether one of `PRODUCTS` takes x, and is the fastest way."""
        simple = is_simple(x) and x.dtype in SERVED and x.shape[-1] == self.in_features and x.numel()
        if not simple or not self._buffers["qweight"].is_cpu:
            return False
        if self.kind != "int4" and self.in_features > LONGEST:
            return False
        rows = 5 if x.dtype is torch.bfloat16 else 2 * FEW
        return self.kind == "int8" or x.numel() <= rows * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"weights of {self.kind} have no gradient: load the model without quantize")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"a layer of {self.in_features} inputs got {x.shape[-1]}")
        q, scale, zero, bias = self.stored(x.dtype)
        lib = None if is_traced() else native.library()
        if lib and self.serves(x):
            return PRODUCTS[self.kind](lib, x, (q, scale, zero, bias))[0]
        if self.kind == "int8":
            return self.whole_product(x, bias)
        if lib and x.numel() and x.dtype is torch.bfloat16 and q.is_cpu and is_simple(x):
            return native.bfloat16_product(lib, x, bias, q, scale, zero)
        step = max(1, CHUNK // self.in_features)
        starts = range(0, self.out_features, step)
        parts = [F.linear(x, self.whole(x.dtype, slice(n, n + step))) for n in starts]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias

    def whole_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Of whole numbers: each row of x rounded to 127 steps on either side of 0."""
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True) / 127
        q = (wide / torch.where(scale > 0, scale, 1)).round().view(-1, self.in_features)
        if q.is_cpu or (q.is_cuda and self.in_features % 8 == self.out_features % 8 == 0):
            rows = len(q) if q.is_cpu else max(len(q), 32)  # which CUDA wants
            q = F.pad(q.to(torch.int8), (0, 0, 0, rows - len(q)))
            y = torch._int_mm(q, self.qweight.t())[: x.numel() // self.in_features]
        else:  # of any size; float64 holds the sums too
            y = q.double() @ self.qweight.double().t()
        y = y.float().view(*x.shape[:-1], self.out_features) * (scale * self.scale)
        return (y if bias is None else y + bias.float()).to(x.dtype)


def to_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    w = w.float()
    scale = w.abs().amax(1) / 127
    return (w / torch.where(scale > 0, scale, 1)[:, None]).round().clamp(-128, 127).to(torch.int8), scale


def to_int4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = F.pad(w.float(), (0, -w.shape[1] % BLOCK)).unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half()
    step = torch.where(scale > 0, scale, 1).float()
    zero = (-low / step).round().clamp(max=15)
    q = (groups / step[..., None] + zero[..., None]).clamp(0, 15).round().to(torch.uint8).flatten(1)
    return q[:, ::2] | q[:, 1::2] << 4, scale, zero.to(torch.uint8)


def quantize(model: nn.Module, kind: str, skip: Iterable[str] = ()) -> nn.Module:
    """Put weights of 8 or 4 bits under `model`, in place and for good, layer by layer: every linear layer but
    those whose name or last part of it is in `skip`. Embeddings, norms and biases stay. An output layer that
    was tied to the token table is not any more. `kind` is "int8", "int8-weights" or "int4" (see `KINDS`).

    ValueError for another kind, a name in `skip` that no layer has, a model that is quantised already.
    """
    for name, layer in linear_layers(model, kind, skip).items():
        put(model, name, filled(name, layer, kind, layer.weight, layer.weight.device))
    return quantized(model, kind)


def linear_layers(model: nn.Module, kind: str, skip: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Name -> layer, of what is to be quantised."""
    if kind not in KINDS:
        raise ValueError(f"quantize must be one of {', '.join(KINDS)}, not {kind!r}")
    if is_quantized(model):
        raise ValueError("the model is quantised already")
    found = {
        name: m for name, m in model.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"
    }
    called = {name: {name, name.rpartition(".")[2]} for name in found}
    if unknown := set(skip).difference(*called.values()) if found else set(skip):
        raise ValueError(f"skip: no linear layer is called {', '.join(sorted(unknown))}")
    return {name: m for name, m in found.items() if not called[name] & set(skip)}


def filled(name: str, layer: nn.Module, kind: str, weight: Tensor, device: str | torch.device) -> Quantized:
    """`layer` in 8 or 4 bits, of its weight as it is stored."""
    try:
        return Quantized.like(layer, kind).fill(matrix(layer, weight), device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, in), also of GPT-1's Conv1D."""
    return weight if type(layer) is nn.Linear else weight.t()


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """What follows of it: nothing is trained, a quantised output layer is tied to nothing, saving says so."""
    model.requires_grad_(False)
    if isinstance(getattr(model, "lm_head", None), Quantized):
        model.config.tie_word_embeddings = False
    told = {"quant_method": "decoders", "version": VERSION, "weights": kind}
    model.config_json["quantization_config"] = told
    if native.library() is None:
        warnings.warn(
            "kernels.c cannot be compiled here (it takes gcc and AVX-512 with bfloat16 and VNNI): "
            "weights of 8 and 4 bits save memory, but not time",
            stacklevel=3,
        )
    return model


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(m, Quantized) for m in model.modules())


def expect(model: nn.Module, is_stored: Callable[[str], bool]) -> None:
    """In a model on the meta device, whose config tells of 8 or 4 bits: room for the layers stored so."""
    told = model.config_json.get("quantization_config")
    if not told:
        return
    if told.get("version") != VERSION:
        old = told.get("version")
        raise ValueError(f"quantised in version {old!r}, and this reads {VERSION}: quantise it again")
    kind = told.get("weights")
    for name, layer in linear_layers(model, kind).items():
        if is_stored(name):
            put(model, name, Quantized.like(layer, kind))
    quantized(model, kind)


class Cost(NamedTuple):
    """What fewer bits cost on a text."""

    logits: float  # the size of the difference in units of the logits' own
    perplexity: float
    before: float  # the unquantised model's perplexity


@torch.no_grad()
def error(model: nn.Module, ids: Tensor, kind: str, skip: Iterable[str] = (), **inputs: Tensor) -> Cost:
    """`model`, which is not quantised, against a copy of `kind` on ids (B, T), two tokens at least."""
    other = quantize(copy.deepcopy(model), kind, skip)
    given = {"input_ids": ids, "labels": ids, **inputs}
    right, wrong = model(**given), other(**given)
    exact = right.logits.double()
    apart = (wrong.logits.double() - exact).norm() / exact.norm()
    return Cost(apart.item(), wrong.loss.double().exp().item(), right.loss.double().exp().item())


def compile(model: nn.Module) -> nn.Module:
    """Make one step of decoding one graph, for `generate(..., compiled=True)`: see `compiled.py`."""
    from . import compiled

    return compiled.compile(model)


# ---- Under a model -----------------------------------------------------------------------------------------


def window_of(model: nn.Module) -> int | None:
    """Positions that a local layer sees."""
    config = getattr(model, "config", None)
    return getattr(config, "sliding_window", None) or getattr(config, "window_size", None)


def prepare(model: nn.Module) -> nn.Module:
    """Put the faster ways under `model`, in place. Parameters, names and types of modules stay."""
    window = window_of(model)
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's, such as a hook's
            continue
        if type(module) is nn.Linear:
            module.forward = MethodType(forward, module)
        elif type(module).__name__ == "Conv1D":
            module.forward = MethodType(turned_forward, module)
        elif type(module).__name__ == "RMSNorm":
            module.forward = MethodType(normed_forward, module)
        elif hasattr(type(module), "attend"):
            module.attend = partial(attention, type(module).attend, window)
            if hasattr(type(module), "rotate"):
                module.rotate = partial(rotation, type(module).rotate)
            if hasattr(type(module), "qkv"):
                module.qkv = MethodType(qkv, module)
    return model


def plain(model: nn.Module) -> nn.Module:
    """Take back what `prepare` did, in place."""
    for module in model.modules():
        if any(runs(module, ours) for ours in (forward, turned_forward, normed_forward)):
            del module.forward
        if hasattr(type(module), "attend"):
            for name in ("qkv", "rotate", "attend"):
                vars(module).pop(name, None)
    return model
