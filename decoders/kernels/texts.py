"""The forward pass of a base or causal model, with the kernels: a text is read and written with them, or
without them, from its beginning to its end, also where they have been compiled in the meantime."""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any
from weakref import WeakSet

import torch.nn as nn

from . import native
from .conditions import must_run_plain_ops
from .int8_cache import new_cache
from .step import step

PLAIN_TEXTS: WeakSet = WeakSet()  # caches of texts that began without the kernels


@cache
def model_forward(model_class: Callable) -> Callable:
    """The `forward` of a prepared base or causal model of this class; its signature stays."""
    plain = model_class.forward  # type: ignore[attr-defined]
    names = list(inspect.signature(plain).parameters)[1:]
    is_of_a_model_file = "KVCache" in plain.__globals__  # else its arguments may be others

    @wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if must_run_plain_ops():
            return plain(self, *args, **kwargs)
        is_known = is_of_a_model_file and len(args) <= len(names)
        is_known = is_known and kwargs.keys() <= set(names[len(args) :])
        given = {**dict(zip(names, args, strict=False)), **kwargs} if is_known else {}
        past = next(filter(is_cache, (*args, *kwargs.values())), None)
        if past is None:
            if is_known and wants_own_cache(self, given):
                args, kwargs = (), {**given, "past_key_values": new_cache(self, self.cache_kind)}
            return begin(plain, self, args, kwargs)
        if past in PLAIN_TEXTS:
            with native.without():
                return plain(self, *args, **kwargs)
        lib = native.library() if is_known else None
        if lib and (output := step(lib, plain, self, given)) is not None:
            return output
        return begun(plain(self, *args, **kwargs))

    return forward


@cache
def plain_forward(plain_class: Callable) -> Callable:
    """`model_forward` by the name that a wrapper calls it by, under which a pickled one finds its own."""
    function = model_forward(plain_class)

    @wraps(function)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    forward.__name__ = "plain_forward"
    return forward


def is_cache(argument: Any) -> bool:
    """Whether it is a model file's KVCache, with something in it."""
    return hasattr(argument, "buffers") and hasattr(argument, "lengths") and len(argument) > 0


def wants_own_cache(model: Any, given: dict[str, Any]) -> bool:
    """Whether this text begins without a cache, and `prepare` was asked for another one than the model's."""
    if getattr(model, "cache_kind", None) is None or given.get("past_key_values") is not None:
        return False
    use_cache = given.get("use_cache")
    return bool(model.config.use_cache if use_cache is None else use_cache)


def begin(plain: Callable, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The first pass of a text, which decides on the operators of all its passes."""
    native.begin_text()
    return begun(plain(model, *args, **kwargs))


def begun(output: Any) -> Any:
    """`output`, its text noted where it was read without the kernels."""
    if native.is_pending() and is_cache(past := getattr(output, "past_key_values", None)):
        PLAIN_TEXTS.add(past)
    return output
