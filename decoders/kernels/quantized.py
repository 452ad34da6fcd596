"""int8 and int4 quantization: linear layers whose weights have 8 or 4 bits.

Weights that `quantize` makes are rounded to the nearest step; there is no calibration. Those of a packed
file are its own bits. `kernels.c` multiplies by them as they are stored. Without it, and for many rows, they
are dequantized a few rows at a time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import calls, native
from .conditions import NATIVE_DTYPES, is_dense_cpu, is_traced
from .linear import MAX_ROWS

GROUP = 32  # inputs that share a scale and a zero, at least
BLOCK = 128  # rows of int4 are padded to a multiple of this
CHUNK = 2**23  # weights that are dequantized at a time
MAX_INPUTS = 2**16  # whose products of 255 by 127 add up to less than 2**31

KINDS = {
    "int8": "a scale for each row of the weight; x is rounded to 8 bits too, each row with its own scale",
    "int8-weights": "a scale for each row of the weight; x stays as it is, up to its 24th bit",
    "int4": "a scale and a zero for each 32 inputs of the weight; x stays as it is, or see PREFILL",
}
PREFILL = {  # what a product of more than MAX_ROWS rows does with int4
    "int8": "rounds x to 8 bits, each 256 inputs of a row with their own scale: sums of whole numbers",
    "exact": "leaves x as it is",
}
INT8_GROUPS = "int8-groups"  # a scale for each group of inputs: a format to be read, not one to quantize to
PRODUCTS = {
    "int8": calls.int8_product,
    "int8-weights": calls.int8_weights_product,
    "int4": calls.int4_product,
    INT8_GROUPS: calls.int8_groups_product,
}
FLOATS = (torch.float16, torch.bfloat16)  # of a scale or a minimum of a group
TENSORS = ("qweight", "scale", "zero", "minimum", "order")

# ---- A layer -----------------------------------------------------------------------------------------------


class Quantized(nn.Module):
    """A linear layer of 8 or 4 bits. Of its tensors it has those that its kind and its file need:

        qweight   int8 (out, in); or, in int4, two numbers a byte, the first in the lower half
        scale     float32 (out,); or 16 bits (out, groups)
        zero      (out, groups) whole numbers: w[n, k] = (qweight[n, k] - zero[n, g]) * scale[n, g]
        minimum   (out, groups) 16 bits, instead: w[n, k] = qweight[n, k] * scale[n, g] + minimum[n, g]
        order     (in,) where inputs of a group are scattered: weight k is for input order[k]

    A group g has 32 inputs, or 64, 128 ..., `quantize` makes such of 32. Rows of int4 are padded to 128
    inputs. The sums of "int8" are whole numbers, the same on every processor.
    """

    weight = None  # is not kept; `dequantize()` computes it
    qweight: Tensor
    scale: Tensor

    def __init__(self, kind: str, in_features: int, out_features: int, bias: nn.Parameter | None):
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, in_features, out_features
        self.bias, self.training = bias, False  # it cannot be trained
        self.prefill = "int8" if kind == "int4" else "exact"
        for name, (dtype, shape) in default_tensors(kind, in_features, out_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    @classmethod
    def empty_like(cls, layer: Any, kind: str) -> "Quantized":
        """On the meta device, with the bias of `layer`; the weights are still to come."""
        outputs, inputs = matrix(layer, layer.weight).shape
        with torch.device("meta"):
            return cls(kind, inputs, outputs, getattr(layer, "bias", None))

    @classmethod
    def of_tensors(
        cls, layer: Any, kind: str, tensors: dict[str, Tensor], device: str | torch.device = "cpu"
    ) -> "Quantized":
        """`layer` of these tensors and no others, with its own bias."""
        quantized = cls.empty_like(layer, kind)
        for name in list(quantized._buffers):
            delattr(quantized, name)
        for name, t in tensors.items():
            quantized.register_buffer(name, t.contiguous().to(device))
        return quantized

    @classmethod
    def from_weight(
        cls, layer: Any, kind: str, weight: Tensor, device: str | torch.device = "cpu", name: str = ""
    ) -> "Quantized":
        """`layer` in 8 or 4 bits, of its `weight` as it is stored. ValueError, which says `name`, for weights
        that are NaN or infinite."""
        tensors = quantize_matrix(matrix(layer, weight.detach()), kind)
        quantized = cls.of_tensors(layer, kind, tensors, device)
        if not bool(quantized.scale.isfinite().all()):
            prefix = f"{name}: " if name else ""
            raise ValueError(f"{prefix}weights that are NaN or infinite cannot be made {kind}")
        return quantized

    @classmethod
    def from_bits(
        cls,
        layer: Any,
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        minimum: Tensor | None = None,
        order: Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> "Quantized | None":
        """`layer` of whole numbers as they are (see `stored_bits`), whose long inputs are not rounded either;
        None where it cannot hold them."""
        tensors = stored_bits(q, scale, zero, minimum, order)
        if tensors is None:
            return None
        quantized = cls.of_tensors(layer, kind_of(tensors), tensors, device)
        quantized.prefill = "exact"
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

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor = slice(None)) -> Tensor:
        """(rows, in): the weights that are stored."""
        w, order = self.by_groups(dtype, rows), self._buffers.get("order")
        return w if order is None else w.index_select(1, order.argsort())

    def by_groups(self, dtype: torch.dtype, rows: slice | Tensor) -> Tensor:
        """(rows, in), inputs in the order of the groups."""
        own: dict[str, Any] = {name: t for name, t in self._buffers.items() if name != "order"}
        taken = {n: t.index_select(0, rows) if isinstance(rows, Tensor) else t[rows] for n, t in own.items()}
        q, scale = taken["qweight"], taken["scale"]
        zero = taken.get("zero", taken.get("minimum"))
        can_call = q.is_cpu and dtype in NATIVE_DTYPES and not is_traced()
        lib = native.library() if can_call else None
        if lib:
            return calls.dequantize(lib, (q, scale, zero, None), self.in_features, dtype)
        return self.formula(q, scale, zero).to(dtype)

    def formula(self, q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """`by_groups` in PyTorch's operators, float32."""
        if self.kind == "int4":
            q = torch.stack((q & 15, q >> 4), -1).flatten(1)
        if scale.dim() == 1:
            return q * scale[:, None]
        group = GROUP * calls.group_of(calls.parts_of(self.qweight), scale.shape[1])
        padded = F.pad(q, (0, scale.shape[1] * group - q.shape[1]))
        numbers, scale = padded.unflatten(1, (-1, group)).float(), scale[..., None].float()
        if "minimum" in self._buffers:
            w = numbers * scale + zero[..., None].float()  # type: ignore[index]
        else:
            w = numbers * scale if zero is None else (numbers - zero[..., None].float()) * scale
        return w.flatten(1)[:, : self.in_features]

    def stored(self, dtype: torch.dtype) -> calls.Layer:
        """qweight, scale, zero (or minimum) and bias. Out of the dictionaries: finding them by `self.` takes
        longer than a small product."""
        buffers: dict[str, Any] = self._buffers
        bias: Any = self._parameters.get("bias")
        bias = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
        return buffers["qweight"], buffers["scale"], buffers.get("zero", buffers.get("minimum")), bias

    def supports(self, x: Tensor) -> bool:
        """Whether one of `PRODUCTS` takes x, in the order of the groups, and is the fastest way."""
        dense = is_dense_cpu(x) and x.dtype in NATIVE_DTYPES and x.shape[-1] == self.in_features
        qweight: Any = self._buffers["qweight"]
        if not (dense and x.numel() and qweight.is_cpu):
            return False
        if self.kind in ("int8", "int8-weights") and self.in_features > MAX_INPUTS:
            return False
        if self.rounds_activations(x):
            return False
        max_rows = 5 if x.dtype is torch.bfloat16 else 2 * MAX_ROWS
        return self.kind == "int8" or x.numel() <= max_rows * self.in_features

    def rounds_activations(self, x: Tensor) -> bool:
        """Whether a product with x, which the kernels take, is one of `prefill` "int8"."""
        return self.prefill == "int8" and self.kind == "int4" and x.numel() > MAX_ROWS * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"weights of {self.kind} have no gradient: load the model without quantize")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"a layer of {self.in_features} inputs got {x.shape[-1]}")
        order = self._buffers.get("order")
        if order is not None:
            x = x.index_select(-1, order)
        q, scale, zero, bias = layer = self.stored(x.dtype)
        lib = None if is_traced() else native.library()
        if lib and self.supports(x):
            return PRODUCTS[self.kind](lib, x, layer)[0]
        if self.kind == "int8":
            return self.int8_product(x, bias)
        can_call = lib and x.numel() and q.is_cpu and is_dense_cpu(x)
        if can_call and x.dtype in NATIVE_DTYPES and self.rounds_activations(x):
            return calls.w4a8_product(lib, x, layer)[0]
        if can_call and x.dtype is torch.bfloat16:
            return calls.bfloat16_product(lib, x, layer)
        return self.dequantized_product(x, bias)

    def dequantized_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """With a few rows of the weight at a time in x's dtype. x is in the order of the groups."""
        step = max(1, CHUNK // self.in_features)
        starts = range(0, self.out_features, step)
        parts = [F.linear(x, self.by_groups(x.dtype, slice(n, n + step))) for n in starts]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias

    def int8_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """In PyTorch's operators: each row of x is rounded to 127 steps on either side of 0."""
        fp32 = x.float()
        scale = fp32.abs().amax(-1, keepdim=True) / 127
        q = (fp32 / torch.where(scale > 0, scale, 1)).round().view(-1, self.in_features)
        on_cpu = q.is_cpu and not is_traced() and int_mm_is_exact()  # a graph may run elsewhere
        if on_cpu or (q.is_cuda and self.in_features % 8 == self.out_features % 8 == 0):
            rows = len(q) if q.is_cpu else max(len(q), 32)  # CUDA wants 32 at least
            q = F.pad(q.to(torch.int8), (0, 0, 0, rows - len(q)))
            y = torch._int_mm(q, self.qweight.t())[: x.numel() // self.in_features]
        else:  # of any size
            y = whole_products(q, self.qweight)
        y = y.float().view(*x.shape[:-1], self.out_features) * (scale * self.scale)
        return (y if bias is None else y + bias.float()).to(x.dtype)


def whole_products(q: Tensor, w: Tensor) -> Tensor:
    """float64 (n, out), exact: whole numbers q (n, in) with w (out, in), of 8 bits. float32 holds the sum of
    1,024 products, float64 all; products of float32 autocast would round."""
    dtype = torch.float64 if torch.is_autocast_enabled(q.device.type) else torch.float32
    y = q.new_zeros(len(q), len(w), dtype=torch.float64)
    for x_part, w_part in zip(q.to(dtype).split(1024, 1), w.split(1024, 1), strict=True):
        y = y + (x_part @ w_part.to(dtype).t())
    return y


@cache
def int_mm_is_exact() -> bool:
    """Whether PyTorch's product of whole numbers is right here. oneDNN adds two products in 16 bits, which do
    not hold them, where ONEDNN_MAX_CPU_ISA tells it to do without VNNI instructions. (On a processor without
    them PyTorch does not ask oneDNN, since pytorch/pytorch#136942.)"""
    q = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(q, q.t()) == 64 * 127 * 127).all())


class QuantizedEmbedding(nn.Embedding):
    """A token embedding of 8 or 4 bits: the rows that are asked for are dequantized, to `dtype`."""

    def __init__(self, table: Quantized, dtype: torch.dtype, padding_idx: int | None = None):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.padding_idx, self.table, self.dtype = padding_idx, table, dtype
        self.training = False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """All of it, dequantized each time: for who looks, not for a step."""
        return self.table.dequantize(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.dtype}"

    def _apply(self, fn: Callable, recurse: bool = True) -> "QuantizedEmbedding":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table.dequantize(self.dtype, ids.reshape(-1)).view(*ids.shape, self.embedding_dim)


# ---- The tensors of a layer --------------------------------------------------------------------------------


def default_tensors(kind: str, inputs: int, outputs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape, of a layer that `quantize` makes, or of int8 by groups of 32."""
    if kind == "int4":
        padded = -(-inputs // BLOCK) * BLOCK
        groups = (outputs, padded // GROUP)
        qweight = torch.uint8, (outputs, padded // 2)
        return {"qweight": qweight, "scale": (torch.float16, groups), "zero": (torch.uint8, groups)}
    qweight = torch.int8, (outputs, inputs)
    by_rows = torch.float32, (outputs,)
    by_groups = torch.float16, (outputs, inputs // GROUP)
    return {"qweight": qweight, "scale": by_groups if kind == INT8_GROUPS else by_rows}


def kind_of(tensors: dict[str, Tensor]) -> str:
    """What a layer of these tensors is called."""
    if tensors["qweight"].dtype == torch.uint8:
        return "int4"
    return "int8-weights" if tensors["scale"].dim() == 1 else INT8_GROUPS


def stored_bits(
    q: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, order: Tensor | None
) -> dict[str, Tensor] | None:
    """The tensors of a layer whose weights are w = (q - zero) * scale, or q * scale + minimum: q (out, in)
    uint8 of two numbers a byte, the first in the lower half, or int8; the others (out, groups). None where a
    layer cannot hold just these: a group has 32, 64, 96 ... inputs, scale and minimum have 16 bits or could
    have; or int8 has a scale for each row."""
    groups, inputs = scale.shape[1], q.shape[1] * (2 if q.dtype == torch.uint8 else 1)
    if q.dtype == torch.int8 and groups == 1 and zero is None and minimum is None and order is None:
        return {"qweight": q, "scale": scale[:, 0].float()}
    if inputs % (groups * GROUP) or (q.dtype == torch.uint8 and zero is None and minimum is None):
        return None
    tables = {"scale": in_16_bits(scale)}
    if zero is not None:
        whole = zero.to(q.dtype)
        tables["zero"] = whole if torch.equal(whole.to(zero.dtype), zero) else None
    if minimum is not None:
        tables["minimum"] = in_16_bits(minimum)
    pad = -inputs % BLOCK if q.dtype == torch.uint8 else 0
    tensors = {"qweight": F.pad(q, (0, pad // 2)) if pad else q}
    for name, table in tables.items():
        if table is None:
            return None
        tensors[name] = by_power_of_two(table, inputs, pad)
    return tensors if order is None else {**tensors, "order": order.int()}


def by_power_of_two(table: Tensor, inputs: int, pad: int) -> Tensor:
    """What each group has one of, of rows that are padded by `pad` inputs. The kernels know groups of 32
    times a power of two: one of 96 is three of 32."""
    times = inputs // (table.shape[1] * GROUP)
    power = times & -times
    if times > power:
        table = table.repeat_interleave(times // power, 1)
    groups = -(-(inputs + pad) // (power * GROUP))
    return F.pad(table, (0, groups - table.shape[1])) if groups > table.shape[1] else table


def in_16_bits(t: Tensor) -> Tensor | None:
    """The same numbers in float16 or bfloat16; None where neither holds them."""
    if t.dtype in FLOATS:
        return t
    for dtype in FLOATS:
        if torch.equal(t.to(dtype).to(t.dtype), t):
            return t.to(dtype)
    return None


def empty_as_stored(layer: Any, kind: str | None, stored: Callable[[str], Tensor | None]) -> Quantized:
    """On the meta device, for tensors of a folder: groups of the size that they have there, with a zero, a
    minimum or an order where they have one. `kind` None: the one that the tensors are. What does not fit is
    left as `quantize` makes it, so that it is reported."""
    tensors = {name: t for name in TENSORS if (t := stored(name)) is not None}
    kind = kind or kind_of(tensors)
    quantized = Quantized.empty_like(layer, kind)
    if kind not in ("int4", INT8_GROUPS):
        return quantized
    outputs, inputs = quantized.out_features, quantized.in_features
    parts = -(-inputs // BLOCK) * BLOCK // GROUP if kind == "int4" else inputs // GROUP
    if kind == INT8_GROUPS and "zero" in tensors:
        quantized.register_buffer("zero", torch.empty_like(quantized.scale, dtype=torch.int8))
    if "minimum" in tensors and "zero" not in tensors:
        quantized._buffers.pop("zero", None)
        quantized.register_buffer("minimum", torch.empty_like(quantized.scale))
    if "order" in tensors:
        quantized.register_buffer("order", torch.empty(inputs, dtype=torch.int32, device="meta"))
    groups = tensors["scale"].shape[-1] if "scale" in tensors else 0
    is_power = 0 < groups <= parts and -(-parts // (calls.group_of(parts, groups))) == groups
    for name in ("scale", "zero", "minimum"):
        if name in quantized._buffers and name in tensors:
            is_float = name != "zero" and tensors[name].dtype in FLOATS
            dtype = tensors[name].dtype if is_float else quantized._buffers[name].dtype
            shape = (outputs, groups if is_power else parts)
            quantized._buffers[name] = torch.empty(shape, dtype=dtype, device="meta")
    return quantized


# ---- Rounding ----------------------------------------------------------------------------------------------


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, in) of the weight of nn.Linear or an embedding, or of GPT-1's Conv1D, which is stored
    transposed."""
    return weight if type(layer) in (nn.Linear, nn.Embedding) else weight.t()


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
