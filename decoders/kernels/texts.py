"""The forward pass of a base model, with the kernels: a text is read and written with them, or without them,
from its beginning to its end, also where they have been compiled in the meantime."""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any
from weakref import WeakSet

import torch.nn as nn

from . import native
from .conditions import must_run_plain_ops
from .step import step

PLAIN_TEXTS: WeakSet = WeakSet()  # caches of texts that began without the kernels


def is_base_model(module: nn.Module) -> bool:
    """A model without a head: it has layers, and a config."""
    has_layers = any(isinstance(child, nn.ModuleList) for child in module.children())
    return has_layers and hasattr(type(module), "config_class")


@cache
def base_forward(model_class: Callable) -> Callable:
    """The `forward` of a prepared base model of this class; its signature stays."""
    plain = model_class.forward  # type: ignore[attr-defined]
    names = list(inspect.signature(plain).parameters)[1:]

    @wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if must_run_plain_ops():
            return plain(self, *args, **kwargs)
        if len(args) > len(names) or not kwargs.keys() <= set(names[len(args) :]):
            return plain(self, *args, **kwargs)  # which says what is wrong
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return run(plain, self, given)

    return forward


def run(plain: Callable, model: nn.Module, given: dict[str, Any]) -> Any:
    """`plain`, with the operators that the text began with; a decoding step by its plan."""
    past: Any = given.get("past_key_values")
    if not (hasattr(past, "update") and len(past)):
        native.begin_text()
    elif past in PLAIN_TEXTS:
        with native.without():
            return plain(model, **given)
    elif (lib := native.library()) and (output := step(lib, plain, model, given)) is not None:
        return output
    output = plain(model, **given)
    if native.is_pending() and hasattr(output.past_key_values, "update"):
        PLAIN_TEXTS.add(output.past_key_values)
    return output
