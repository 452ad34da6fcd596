"""One step of decoding as one graph: a cache of fixed length, the position a tensor.

    generation.generate(model, ids, compiled=True, ...)     # the first step takes its time

A prompt is read as ever. After that each step has the same shapes: keys and values lie in memory for all
that may come, where the new ones are written at a place that a tensor tells, and a mask hides what is not
written yet; so `torch.compile` makes one graph for all steps, and on a GPU one CUDA graph. Model files know
nothing of it: the cache hands out its whole memory (of a layer with a window, that), and the attention
function gets the mask that belongs to it.
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .core import window_of

ROUND = 256  # caches have a multiple of this for length, so that few lengths need a graph of their own


class Fixed:
    """What a family's KVCache becomes in a step: buffers (B, K, N, D) that stay where they are."""

    stepping = False  # inside of a step; else it is an ordinary cache with room

    def __len__(self) -> int:
        return self.buffers[0][0].shape[2] - 1 if self.stepping else super().__len__()

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.stepping:
            return super().update(layer, k, v)
        found, window = [], self.windows[layer]
        for buffer, new in zip(self.buffers[layer], (k, v), strict=True):
            buffer.index_copy_(2, self.place, new)
            found.append(buffer if window is None else buffer.index_select(2, self.near[window]))
        return tuple(found)


class Decoder:
    """The compiled step of a model."""

    def __init__(self, model: nn.Module):
        self.model, self.masks = model, None
        window, layers = window_of(model), next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        kinds = getattr(model.config, "attention_layers", ["local"] * len(layers))
        self.windows = [window if kind == "local" else None for kind in kinds]
        attentions = [module for module in model.modules() if hasattr(type(module), "attend")]
        self.attends = {module: partial(self.attend, type(module).attend) for module in attentions}
        self.graphs: dict[tuple[int, int], Callable] = {}  # (rows, length) -> the compiled step

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which a copy makes anew."""
        return {**vars(self), "graphs": {}}

    def graph(self, shape: tuple[int, int], mode: str | None) -> Callable:
        """Of code of its own: PyTorch counts the graphs of a piece of code, and refuses the ninth."""
        if shape not in self.graphs:
            code = Decoder.step.__code__.replace(co_name=f"step_{id(self)}_{shape}")
            step = MethodType(FunctionType(code, globals()), self)
            self.graphs[shape] = torch.compile(step, fullgraph=True, dynamic=False, mode=mode)
        return self.graphs[shape]

    def attend(self, plain: Callable, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any):
        """As ever, with the mask for these keys."""
        return plain(q, k, v, self.masks[k.shape[2]].to(q.dtype), *rest)

    def step(self, ids: Tensor, places: Tensor, place: Tensor, seen: Tensor, cache: Any) -> Tensor:
        """Logits (B, 1, V) of ids (B, 1) at `places` (B, 1), written to `place` (1,) of the cache, of which
        each row sees `seen` (B, N)."""
        N = seen.shape[1]
        bias = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)[:, None, None]
        cache.place, cache.near, self.masks = place, {}, {N: bias}
        for window in {w for w in self.windows if w is not None}:
            near = place - torch.arange(min(window, N) - 1, -1, -1, device=place.device)
            cache.near[window] = near.clamp(min=0)
            own = bias.index_select(3, cache.near[window]).masked_fill(near < 0, -torch.inf)
            self.masks[len(near)] = own if window < N else bias
        output = self.model(ids, position_ids=places, past_key_values=cache, use_cache=True)
        self.masks = cache.place = cache.near = None
        return output.logits

    def __call__(self, inputs: dict[str, Any], length: int) -> Any:
        """`model(**inputs)` for one id a row, whose cache may become `length` long."""
        cache, mask, ids = inputs["past_key_values"], inputs["attention_mask"], inputs["input_ids"]
        n = len(cache)
        cache = self.fixed(cache, max(length, n + 1))
        N = cache.buffers[0][0].shape[2]
        places = inputs["position_ids"]
        places = torch.full_like(ids, n) if places is None else places
        seen = (torch.arange(N, device=ids.device) <= n).expand(len(ids), N)
        if mask is not None:
            seen = seen & torch.nn.functional.pad(mask, (0, N - n - 1)).bool()
        run = self.graph((len(ids), N), "reduce-overhead" if ids.is_cuda else None)
        before = {module: vars(module).get("attend") for module in self.attends}
        cache.stepping = True
        try:
            for module, attend in self.attends.items():
                module.attend = attend
            place = torch.tensor([n], device=ids.device)
            given = [t.clone(memory_format=torch.contiguous_format) for t in (ids, places, place, seen)]
            logits = run(*given, cache)  # whose strides are the same in all steps too
        finally:
            cache.stepping, self.masks = False, None
            for module, attend in before.items():
                del module.attend
                if attend is not None:
                    module.attend = attend
        cache.lengths = [n + 1] * len(cache.lengths)
        output = sys.modules[type(self.model).__module__].CausalLMOutput
        return output(None, logits.clone(), cache)

    def fixed(self, cache: Any, length: int) -> Any:
        """The cache with room for `length` tokens, and more where others then have the same length."""
        limit = getattr(self.model, "max_positions", None) or sys.maxsize
        N = min(-(-length // ROUND) * ROUND, limit)
        if not isinstance(cache, Fixed):
            cache.__class__ = kind_of(type(cache))  # the same object, which the caller may have given
            cache.windows = self.windows
        for i, ((k, v), (wide, _)) in enumerate(zip(cache, list(cache.buffers), strict=True)):
            if wide.shape[2] != N:
                grown = tuple(torch.nn.functional.pad(t, (0, 0, 0, N - t.shape[2])) for t in (k, v))
                for t in grown if k.is_cuda else ():
                    torch._dynamo.mark_static_address(t)  # else each step would copy it
                cache.buffers[i] = grown
        return cache


@cache
def kind_of(base: type) -> type:
    """A family's cache that can be fixed."""
    return type(f"Fixed{base.__name__}", (Fixed, base), {})


def compile(model: nn.Module) -> nn.Module:
    """`model` with a `decoder`, in place; nothing is compiled before its first step."""
    if not hasattr(model, "decoder"):
        model.decoder = Decoder(model)
    return model
