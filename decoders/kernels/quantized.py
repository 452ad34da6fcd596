"""int8 and int4 quantization: linear layers whose weights have 8 or 4 bits, and what that costs.

    kernels.quantize(model, "int4")
    kernels.error(model, ids, "int4")

Weights are rounded to the nearest step; there is no calibration. `kernels.c` multiplies by them as they are
stored. Without it, and for many rows, they are dequantized a few rows at a time.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import calls, native
from .conditions import NATIVE_DTYPES, is_dense_cpu, is_traced
from .linear import MAX_ROWS

GROUP = 32  # inputs that share a scale and a zero in int4
BLOCK = 128  # rows of int4 are padded to a multiple of this
CHUNK = 2**23  # weights that are dequantized at a time
MAX_INPUTS = 2**16  # whose products of 255 by 127 add up to less than 2**31
VERSION = 1  # of the format in a folder: a change needs another reader

KINDS = {
    "int8": "a scale for each row of the weight; x is rounded to 8 bits too, each row with its own scale",
    "int8-weights": "a scale for each row of the weight; x stays as it is, up to its 24th bit",
    "int4": "a scale and a zero for each 32 inputs of the weight; x stays as it is",
}
PRODUCTS = {
    "int8": calls.int8_product,
    "int8-weights": calls.int8_weights_product,
    "int4": calls.int4_product,
}
INT8_GROUPS = "int8-groups"  # a scale for each 32 inputs: a format to be read, not one to quantize to

# ---- A layer -----------------------------------------------------------------------------------------------


class Quantized(nn.Module):
    """A linear layer of 8 or 4 bits: `qweight` int8 and `scale` (out,); in int4 `qweight` with two numbers a
    byte, the first in the lower half, `scale` in float16 and `zero`, for 32 inputs each. Rows of int4 are
    padded to 128 inputs.

        int8    w[n, k] = qweight[n, k] * scale[n]
        int4    w[n, k] = (qweight[n, k] - zero[n, k // 32]) * scale[n, k // 32]

    The sums of "int8" are whole numbers, the same on every processor.
    """

    weight = None  # is not kept; `dequantize()` computes it
    qweight: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, kind: str, in_features: int, out_features: int, bias: nn.Parameter | None):
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, in_features, out_features
        self.bias, self.training = bias, False  # it cannot be trained
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
    def empty_like(cls, layer: Any, kind: str) -> "Quantized":
        """On the meta device, with the bias of `layer`; the weights are still to come."""
        outputs, inputs = matrix(layer, layer.weight).shape
        with torch.device("meta"):
            if kind == INT8_GROUPS:
                return Int8Groups(inputs, outputs, layer.bias)
            return cls(kind, inputs, outputs, layer.bias)

    @classmethod
    def from_weight(
        cls, layer: Any, kind: str, weight: Tensor, device: str | torch.device = "cpu", name: str = ""
    ) -> "Quantized":
        """`layer` in 8 or 4 bits, of its `weight` as it is stored. ValueError, which says `name`, for weights
        that are NaN or infinite."""
        quantized = cls.empty_like(layer, kind)
        for key, t in quantize_matrix(matrix(layer, weight.detach()), kind).items():
            setattr(quantized, key, t.to(device))
        if not bool(quantized.scale.isfinite().all()):
            prefix = f"{name}: " if name else ""
            raise ValueError(f"{prefix}weights that are NaN or infinite cannot be made {kind}")
        return quantized

    @classmethod
    def from_bits(
        cls, layer: Any, q: Tensor, scale: Tensor, zero: Tensor | None, device: str | torch.device = "cpu"
    ) -> "Quantized | None":
        """`layer` of whole numbers as they are, w = (q - zero) * scale: q (out, in) uint8 below 16 with scale
        and zero (out, groups), or int8 with a scale (out, groups) and no zero. None where that cannot be held
        exactly: groups have 32, 64, 96 ... inputs and scales that float16 holds, or of int8 whole rows."""
        inputs, groups = q.shape[1], scale.shape[1]
        half = scale.half()
        in_groups = not inputs % (groups * GROUP) and torch.equal(half.to(scale.dtype), scale)
        times = inputs // (groups * GROUP)
        if q.dtype == torch.int8:
            kind = "int8-weights" if groups == 1 else INT8_GROUPS
            if zero is not None or not (groups == 1 or in_groups):
                return None
            spread = scale[:, 0].float() if groups == 1 else half.repeat_interleave(times, 1)
            tensors = {"qweight": q, "scale": spread}
        else:
            kind = "int4"
            if zero is None or not in_groups:
                return None
            pad = -inputs % BLOCK
            q = F.pad(q, (0, pad))
            scale, zero = (F.pad(t.repeat_interleave(times, 1), (0, pad // GROUP)) for t in (half, zero))
            tensors = {"qweight": q[:, ::2] | q[:, 1::2] << 4, "scale": scale, "zero": zero}
        quantized = cls.empty_like(layer, kind)
        for key, t in tensors.items():
            setattr(quantized, key, t.contiguous().to(device))
        return quantized

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}, bias={self.bias is not None}"

    def train(self, mode: bool = True) -> "Quantized":
        if mode:
            raise ValueError(f"weights of {self.kind} cannot be trained: load the model without quantize")
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Quantized":
        """To another device; the dtypes are those of the format, and `model.half()` leaves them alone."""
        buffers, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)
        for name, t in buffers.items():
            if t is not None:
                moved = fn(t)
                self._buffers[name] = moved if moved.dtype == t.dtype else t.to(moved.device)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """(rows, in): the weights that are stored."""
        q, scale = self.qweight[rows], self.scale[rows]
        can_call = q.is_cpu and dtype in NATIVE_DTYPES and not is_traced()
        lib = native.library() if can_call else None
        if self.kind != "int4":
            return calls.dequantize_int8(lib, q, scale, dtype) if lib else (q * scale[:, None]).to(dtype)
        zero = self.zero[rows]
        if lib:
            return calls.dequantize_int4(lib, q, scale, zero, self.in_features, dtype)
        pairs = torch.stack((q & 15, q >> 4), -1).view(*scale.shape, GROUP)
        w = (pairs.float() - zero[..., None].float()) * scale[..., None].float()
        return w.flatten(1)[:, : self.in_features].to(dtype)

    def stored(self, dtype: torch.dtype) -> calls.Layer:
        """qweight, scale, zero and bias. Out of the dictionaries: finding them by `self.` takes longer than a
        small product."""
        buffers: dict[str, Any] = self._buffers
        bias: Any = self._parameters.get("bias")
        bias = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
        return buffers["qweight"], buffers["scale"], buffers.get("zero"), bias

    def supports(self, x: Tensor) -> bool:
        """Whether one of `PRODUCTS` takes x, and is the fastest way."""
        dense = is_dense_cpu(x) and x.dtype in NATIVE_DTYPES and x.shape[-1] == self.in_features
        qweight: Any = self._buffers["qweight"]
        if not (dense and x.numel() and qweight.is_cpu):
            return False
        if self.kind != "int4" and self.in_features > MAX_INPUTS:
            return False
        max_rows = 5 if x.dtype is torch.bfloat16 else 2 * MAX_ROWS
        return self.kind == "int8" or x.numel() <= max_rows * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"weights of {self.kind} have no gradient: load the model without quantize")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"a layer of {self.in_features} inputs got {x.shape[-1]}")
        q, scale, zero, bias = layer = self.stored(x.dtype)
        lib = None if is_traced() else native.library()
        if lib and self.supports(x):
            return PRODUCTS[self.kind](lib, x, layer)[0]
        if self.kind == "int8":
            return self.int8_product(x, bias)
        if lib and x.numel() and x.dtype is torch.bfloat16 and q.is_cpu and is_dense_cpu(x):
            return calls.bfloat16_product(lib, x, layer)
        return self.dequantized_product(x, bias)

    def dequantized_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """With a few rows of the weight at a time in x's dtype."""
        step = max(1, CHUNK // self.in_features)
        starts = range(0, self.out_features, step)
        parts = [F.linear(x, self.dequantize(x.dtype, slice(n, n + step))) for n in starts]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias

    def int8_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """In PyTorch's operators: each row of x is rounded to 127 steps on either side of 0."""
        fp32 = x.float()
        scale = fp32.abs().amax(-1, keepdim=True) / 127
        q = (fp32 / torch.where(scale > 0, scale, 1)).round().view(-1, self.in_features)
        if q.is_cpu or (q.is_cuda and self.in_features % 8 == self.out_features % 8 == 0):
            rows = len(q) if q.is_cpu else max(len(q), 32)  # CUDA wants 32 at least
            q = F.pad(q.to(torch.int8), (0, 0, 0, rows - len(q)))
            y = torch._int_mm(q, self.qweight.t())[: x.numel() // self.in_features]
        else:  # of any size; float64 holds the sums too
            y = q.double() @ self.qweight.double().t()
        y = y.float().view(*x.shape[:-1], self.out_features) * (scale * self.scale)
        return (y if bias is None else y + bias.float()).to(x.dtype)


class Int8Groups(Quantized):
    """A linear layer of int8 with a `scale` in float16 for each 32 inputs, as GGUF's Q8_0 has it:

    w[n, k] = qweight[n, k] * scale[n, k // 32]
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None):
        super().__init__("int8-weights", in_features, out_features, bias)
        self.kind = INT8_GROUPS
        self.scale = torch.empty(out_features, in_features // GROUP, dtype=torch.float16)

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        q, scale = self.qweight[rows], self.scale[rows]
        return (q.unflatten(1, (-1, GROUP)) * scale[..., None].float()).flatten(1).to(dtype)

    def supports(self, x: Tensor) -> bool:
        """Whether the kernel takes x, and is the fastest way."""
        dense = is_dense_cpu(x) and x.dtype in NATIVE_DTYPES and x.shape[-1] == self.in_features
        return dense and self.qweight.is_cpu and 0 < x.numel() <= 12 * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"weights of {self.kind} have no gradient: load the model without packed")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"a layer of {self.in_features} inputs got {x.shape[-1]}")
        layer = self.stored(x.dtype)
        lib = None if is_traced() else native.library()
        if lib and self.supports(x):
            return calls.int8_groups_product(lib, x, layer)[0]
        return self.dequantized_product(x, layer[-1])


# ---- Rounding ----------------------------------------------------------------------------------------------


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, in) of the weight of nn.Linear, or of GPT-1's Conv1D, which is stored transposed."""
    return weight if type(layer) is nn.Linear else weight.t()


def quantize_matrix(w: Tensor, kind: str) -> dict[str, Tensor]:
    """`qweight`, `scale` and, of int4, `zero` of w (out, in)."""
    lib = native.library() if is_dense_cpu(w) and w.dtype in NATIVE_DTYPES else None
    tensors: tuple[Tensor, ...]
    if lib:
        w = w if w.stride(1) == 1 else w.contiguous()
        tensors = calls.to_int4(lib, w) if kind == "int4" else calls.to_int8(lib, w)
    else:
        tensors = to_int4(w) if kind == "int4" else to_int8(w)
    return dict(zip(("qweight", "scale", "zero"), tensors, strict=False))


def to_int8(w: Tensor) -> tuple[Tensor, ...]:
    """Row by row: scale = max |w| / 127."""
    w = w.float()
    scale = w.abs().amax(1) / 127
    q = (w / torch.where(scale > 0, scale, 1)[:, None]).round().clamp(-128, 127)
    return q.to(torch.int8), scale


def to_int4(w: Tensor) -> tuple[Tensor, ...]:
    """32 inputs at a time: scale = (max - min) / 15, with 0 between min and max."""
    groups = F.pad(w.float(), (0, -w.shape[1] % BLOCK)).unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half()
    step = torch.where(scale > 0, scale, 1).float()
    zero = (-low / step).round().clamp(max=15)
    q = (groups / step[..., None] + zero[..., None]).clamp(0, 15).round().to(torch.uint8).flatten(1)
    return q[:, ::2] | q[:, 1::2] << 4, scale, zero.to(torch.uint8)


# ---- A model -----------------------------------------------------------------------------------------------


def quantize(model: nn.Module, kind: str, skip: Iterable[str] = ()) -> nn.Module:
    """Quantize the weights of `model`, in place and for good, layer by layer: every linear layer but those
    whose name or last part of it is in `skip`. Embeddings, norms and biases stay. An output layer that was
    tied to the embedding is not any more. `kind` is "int8", "int8-weights" or "int4" (see `KINDS`).

    ValueError for another kind, a name in `skip` that no layer has, a model that is quantised already.
    """
    for name, layer in linear_layers(model, kind, skip).items():
        weight = layer.weight
        replace_module(model, name, Quantized.from_weight(layer, kind, weight, weight.device, name))
    return mark_quantized(model, kind)


def linear_layers(model: nn.Module, kind: str, skip: Iterable[str] = ()) -> dict[str, Any]:
    """Name -> layer, of what is to be quantised."""
    if kind not in (*KINDS, INT8_GROUPS):
        raise ValueError(f"quantize must be one of {', '.join(KINDS)}, not {kind!r}")
    if is_quantized(model):
        raise ValueError("the model is quantised already")
    layers = {
        name: m for name, m in model.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"
    }
    names = {name: {name, name.rpartition(".")[2]} for name in layers}
    if unknown := set(skip).difference(*names.values()) if layers else set(skip):
        raise ValueError(f"skip: no linear layer is called {', '.join(sorted(unknown))}")
    return {name: m for name, m in layers.items() if not names[name] & set(skip)}


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `name` is in `model`."""
    parent, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(parent), own_name, layer)


def mark_quantized(model: Any, kind: str) -> nn.Module:
    """What follows of it: nothing is trained, a quantised output layer is tied to nothing, saving says so."""
    model.requires_grad_(False)
    if isinstance(getattr(model, "lm_head", None), Quantized):
        model.config.tie_word_embeddings = False
    entry = {"quant_method": "decoders", "version": VERSION, "weights": kind}
    model.config_json["quantization_config"] = entry
    if native.library() is None and not native.is_pending():
        warnings.warn(
            f"kernels.c is {native.status()} (it takes gcc and AVX-512 with bfloat16 and VNNI): "
            "weights of 8 and 4 bits save memory, but not time",
            stacklevel=3,
        )
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether a layer of `model` has 8 or 4 bits."""
    return any(isinstance(m, Quantized) for m in model.modules())


def expect_quantized(model: Any, is_stored: Callable[[str], bool]) -> None:
    """In a model on the meta device, whose config tells of 8 or 4 bits: empty layers for those stored so."""
    entry = model.config_json.get("quantization_config")
    if not entry:
        return
    if (version := entry.get("version")) != VERSION:
        raise ValueError(f"quantised in version {version!r}, and this reads {VERSION}: quantise it again")
    kind = entry.get("weights")
    for name, layer in linear_layers(model, kind).items():
        if is_stored(name):
            replace_module(model, name, Quantized.empty_like(layer, kind))
    mark_quantized(model, kind)


# ---- What it costs -----------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What fewer bits cost on a text."""

    logits: float  # |difference| / |logits|, of all positions together
    perplexity: float
    before: float  # the unquantised model's perplexity


@torch.no_grad()
def error(model: nn.Module, ids: Tensor, kind: str, skip: Iterable[str] = (), **inputs: Tensor) -> Cost:
    """`model`, which is not quantised, against a copy of `kind` on ids (B, T), two tokens at least."""
    other = quantize(copy.deepcopy(model), kind, skip)
    arguments = {"input_ids": ids, "labels": ids, **inputs}
    exact, rounded = model(**arguments), other(**arguments)
    logits = exact.logits.double()
    difference = (rounded.logits.double() - logits).norm() / logits.norm()
    return Cost(difference.item(), rounded.loss.double().exp().item(), exact.loss.double().exp().item())
