"""A key/value cache of 8 bits: half the memory of 16, and half of what a step over a long text has to read.

    kernels.prepare(model, cache="int8")                              # for every text of this model
    model(ids, past_key_values=kernels.new_cache(model, "int8"))      # for this one

Each head of each position has a scale of its own, max |x| / 127. A row of D numbers is stored as D bytes with
the scale, a float32, in four more behind them; so what a model file's KVCache does with its buffers (grow,
truncate, reorder) it does with these. What is read is what is stored, from the first pass on: a text in parts
is then a whole one.
"""

from functools import cache
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import native
from .conditions import must_run_plain_ops
from .families import class_of

CACHES = ("int8",)
SCALE = 4  # bytes of a scale


def quantize_rows(x: Tensor) -> Tensor:
    """(..., D + 4) int8 of x (..., D)."""
    fp32 = x.float()
    scale = fp32.abs().amax(-1, keepdim=True) / 127
    q = (fp32 / torch.where(scale > 0, scale, 1)).round().to(torch.int8)
    return torch.cat([q, scale.view(torch.int8)], -1)


def dequantize_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., D) of what `quantize_rows` made."""
    scale = rows[..., -SCALE:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return (rows[..., :-SCALE] * scale).to(dtype)


class Rows(Tensor):
    """Keys or values (B, K, S, D) of a cache, for one new token: `attention` reads the rows as they are
    stored, and any operator of PyTorch what they stand for."""

    rows: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, dtype: torch.dtype) -> "Rows":
        shape = (*rows.shape[:-1], rows.shape[-1] - SCALE)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=rows.device)
        self.rows = rows
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.slice.Tensor:  # as a window is cut out
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if dim % 4 != 3:
                return cls(func(args[0].rows, *args[1:], **kwargs), args[0].dtype)
        args, kwargs = tree_map_only(Rows, Rows.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def dequantize(self) -> Tensor:
        return dequantize_rows(self.rows, self.dtype)


class Int8Cache:
    """What a model file's KVCache becomes: `cache[i]` gives the numbers that the 8 bits stand for."""

    buffers: list[tuple[Tensor, Tensor]]  # (B, K, S, D + 4) int8
    lengths: list[int]
    dtype = torch.float32  # of the keys that were given

    def __init__(self, past: Any = ()):
        super().__init__()
        for layer, (k, v) in enumerate(past):
            self.update(layer, k, v)

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """(B, K, S, D + 4) int8, twice."""
        n, (k, v) = self.lengths[layer], self.buffers[layer]
        return k[:, :, :n], v[:, :, :n]

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.stored(layer)
        return dequantize_rows(k, self.dtype), dequantize_rows(v, self.dtype)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As the model file's own, which appends the rows."""
        if k.requires_grad or v.requires_grad:
            raise ValueError("a cache of 8 bits has no gradient: read with it under torch.no_grad()")
        self.dtype = k.dtype
        new = quantize_rows(k), quantize_rows(v)
        if layer == len(self.buffers):
            self.buffers.append(new)
            self.lengths.append(k.shape[2])
        else:
            start = self.lengths[layer]
            append: Any = self.append  # type: ignore[attr-defined]
            past_k, past_v = self.buffers[layer]
            self.buffers[layer] = append(past_k, new[0], start), append(past_v, new[1], start)
            self.lengths[layer] = start + k.shape[2]
        if k.shape[2] == 1 and k.is_cpu and not must_run_plain_ops() and native.library():
            rows = self.stored(layer)
            return Rows(rows[0], k.dtype), Rows(rows[1], k.dtype)
        return self[layer]

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""
        self.buffers = [(k[:, :, :n], v[:, :, :n]) for k, v in self.buffers]
        self.lengths = [min(n, length) for length in self.lengths]

    def reorder(self, index: Tensor) -> None:
        """Sequence i becomes what sequence `index[i]` was."""
        rows = [self.stored(layer) for layer in range(len(self.buffers))]
        self.buffers = []
        super().reorder(index)  # type: ignore[misc]  # of what the model file's cache knows beside the rows
        self.buffers = [(k[index], v[index]) for k, v in rows]


@cache
def int8_class(base: Any) -> type:
    """A model file's cache with 8 bits."""
    return type(f"Int8{base.__name__}", (Int8Cache, base), {"__reduce__": reduced})


def reduced(self: Any) -> tuple:
    """How copy and pickle make one: its class has no name in a file."""
    return empty, (type(self).__mro__[2],), vars(self)


def empty(base: Any) -> Any:
    return int8_class(base)()


def check_kind(kind: str | None) -> str | None:
    """ValueError for what no cache is."""
    if kind is not None and kind not in CACHES:
        raise ValueError(f"cache must be {' or '.join(map(repr, CACHES))} or None, not {kind!r}")
    return kind


def new_cache(model: nn.Module, kind: str | None = None) -> Any:
    """An empty key/value cache for `model`: its file's own (None), or "int8"."""
    check_kind(kind)
    for module in model.modules():
        names = getattr(class_of(module).forward, "__globals__", {})
        make = names.get("cache_of") or names.get("longrope_cache_of")
        if make is not None and hasattr(type(module), "config_class"):
            exact = type(make(None, True))
            return int8_class(exact)() if kind else exact()
    raise ValueError(f"{type(model).__name__} is no model of one of the six files")
