"""One step of decoding as one graph: a cache of fixed length, the position a tensor.

    decoding.generate(model, ids, compiled=True, ...)     # the first step takes its time

A prompt is read as ever. After that each step has the same shapes: keys and values lie in memory for all
that may come, the new ones are written at a position that a tensor holds, and a mask hides what is not
written yet. So `torch.compile` makes one graph for all steps, and on a GPU one CUDA graph. Model files know
nothing of it: the cache hands out its whole memory (of a layer with a sliding window, that), and the
attention function gets the mask that belongs to it.
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .attention import window_of
from .int8_cache import Int8Cache

ROUND = 256  # caches have a multiple of this for length, so that few lengths need a graph of their own


class Fixed:
    """What a family's KVCache becomes in a step: buffers (B, K, N, D) that stay where they are."""

    buffers: list[tuple[Tensor, Tensor]]
    windows: list[int | None]  # of each layer
    position: Tensor  # (1,), where the new keys are written
    window_index: dict[int, Tensor]  # window -> the positions in it
    stepping = False  # inside of a step; else it is an ordinary cache with room

    def __len__(self) -> int:
        return self.buffers[0][0].shape[2] - 1 if self.stepping else super().__len__()  # type: ignore[misc]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if not self.stepping:
            return super().update(layer, k, v)  # type: ignore[misc]
        for buffer, new in zip(self.buffers[layer], (k, v), strict=True):
            buffer.index_copy_(2, self.position, new)
        window = self.windows[layer]
        if window is None:
            return self.buffers[layer]
        return tuple(buffer.index_select(2, self.window_index[window]) for buffer in self.buffers[layer])


class Decoder:
    """The compiled step of a model."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.masks: dict[int, Tensor] = {}  # number of keys -> the mask for them
        layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        kinds = getattr(model.config, "attention_layers", ["local"] * len(layers))
        self.windows = [window_of(model) if kind == "local" else None for kind in kinds]
        attentions: list[Any] = [module for module in model.modules() if hasattr(type(module), "attend")]
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

    def attend(
        self, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any
    ) -> Any:
        """As ever, with the mask for these keys."""
        return plain(q, k, v, self.masks[k.shape[2]].to(q.dtype), *rest)

    def step(
        self, ids: Tensor, position_ids: Tensor, position: Tensor, visible: Tensor, cache: Any
    ) -> Tensor:
        """Logits (B, 1, V) of ids (B, 1) at `position_ids` (B, 1). Keys and values are written to `position`
        (1,) of the cache, of which each row sees `visible` (B, N)."""
        N = visible.shape[1]
        mask = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)[:, None, None]
        cache.position, cache.window_index, self.masks = position, {}, {N: mask}
        for window in {w for w in self.windows if w is not None}:
            near = position - torch.arange(min(window, N) - 1, -1, -1, device=position.device)
            cache.window_index[window] = near.clamp(min=0)
            windowed = mask.index_select(3, cache.window_index[window]).masked_fill(near < 0, -torch.inf)
            self.masks[len(near)] = windowed if window < N else mask
        output = self.model(ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        self.masks, cache.position, cache.window_index = {}, None, None
        return output.logits

    def __call__(self, inputs: dict[str, Any], length: int) -> Any:
        """`model(**inputs)` for one id a row, whose cache may become `length` long."""
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        n = len(inputs["past_key_values"])
        cache = self.fixed(inputs["past_key_values"], max(length, n + 1))
        N = cache.buffers[0][0].shape[2]
        position_ids = inputs["position_ids"]
        position_ids = torch.full_like(ids, n) if position_ids is None else position_ids
        visible = (torch.arange(N, device=ids.device) <= n).expand(len(ids), N)
        if mask is not None:
            visible = visible & torch.nn.functional.pad(mask, (0, N - n - 1)).bool()
        position = torch.tensor([n], device=ids.device)
        logits = self.run(cache, ids, position_ids, position, visible)
        cache.lengths = [n + 1] * len(cache.lengths)
        output = sys.modules[type(self.model).__module__].CausalLMOutput  # type: ignore[attr-defined]
        return output(None, logits.clone(), cache)

    def run(self, cache: Any, *inputs: Tensor) -> Tensor:
        """The compiled `step`, with the attention modules' `attend` replaced while it runs."""
        ids, visible = inputs[0], inputs[-1]
        graph = self.graph((len(ids), visible.shape[1]), "reduce-overhead" if ids.is_cuda else None)
        previous = {module: vars(module).get("attend") for module in self.attends}
        cache.stepping = True
        try:
            for module, attend in self.attends.items():
                module.attend = attend
            contiguous = [t.clone(memory_format=torch.contiguous_format) for t in inputs]
            return graph(*contiguous, cache)  # the strides are the same in all steps too
        finally:
            cache.stepping, self.masks = False, {}
            for module, attend in previous.items():
                del module.attend
                if attend is not None:
                    module.attend = attend

    def fixed(self, cache: Any, length: int) -> Any:
        """The cache with room for `length` tokens, and more where others then have the same length."""
        limit = getattr(self.model, "max_positions", None) or sys.maxsize
        N = min(-(-length // ROUND) * ROUND, limit)
        if isinstance(cache, Int8Cache):
            raise ValueError(
                "a compiled step has keys and values in the model's dtype: leave cache='int8' out"
            )
        if not isinstance(cache, Fixed):
            # the same object, which the caller may have given
            cache.__class__ = fixed_class(type(cache))  # type: ignore[arg-type]
            cache.windows = self.windows
        for i, ((k, v), (buffer, _)) in enumerate(zip(cache, list(cache.buffers), strict=True)):
            if buffer.shape[2] != N:
                grown = tuple(torch.nn.functional.pad(t, (0, 0, 0, N - t.shape[2])) for t in (k, v))
                for t in grown if k.is_cuda else ():
                    torch._dynamo.mark_static_address(t)  # else each step would copy it
                cache.buffers[i] = grown
        return cache


@cache
def fixed_class(base: Any) -> type:
    """A family's cache that can be fixed."""
    return type(f"Fixed{base.__name__}", (Fixed, base), {})


def compile(model: Any) -> nn.Module:
    """`model` with a `decoder`, in place; nothing is compiled before its first step."""
    if not hasattr(model, "decoder"):
        model.decoder = Decoder(model)
    return model
