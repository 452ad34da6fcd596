"""What kernels replace on a loaded model, and how it is taken back.

| module | attribute | by |
|---|---|---|
| `nn.Linear` | `forward` | `linear.linear_forward` |
| `Conv1D` (GPT-1) | `forward` | `linear.conv1d_forward` |
| `RMSNorm` (Phi-3) | `forward` | `linear.rms_norm_forward` |
| an attention module | `attend(q, k, v, mask, scale, ...)` | `attention.attention` |
| the same, where it has it | `rotate(x, cos, sin)` | `attention.rotate` |
| the same, where it has it | `qkv(x)` | `attention.qkv` |
| a base model, such as `PhiModel` | `forward` | `texts.model_forward` |
| a causal language model | `forward` | `texts.model_forward` |
| both of these in `decoders.hf` | `plain_forward` | `texts.plain_forward` |

All of these compute the same, for inference on a CPU (a layer of int4 rounds long inputs with the kernels
alone, unless its `prefill` is "exact"). Each looks at every call: where PyTorch has to see the
plain operations (see `conditions.py`) it runs them. No global setting is touched, so threads may share a
model. An attention module is one whose class has `attend`, a base model one with a list of layers.
"""

from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch.nn as nn

from .attention import attention, is_forward, qkv, rotate, window_of
from .families import class_of, is_base_model, is_causal_model
from .int8_cache import check_kind
from .linear import conv1d_forward, linear_forward, rms_norm_forward
from .quantizing import set_prefill
from .step import PLAN_STATE
from .texts import model_forward, plain_forward

M = TypeVar("M", bound=nn.Module)

FORWARDS = {"Linear": linear_forward, "Conv1D": conv1d_forward, "RMSNorm": rms_norm_forward}
ATTENTION_HOOKS = ("attend", "rotate", "qkv")


def prepare(model: M, cache: str | None = None, prefill: str | None = None) -> M:
    """Put the kernels under `model`, in place. Parameters, names and types of modules stay.

    `cache="int8"`: texts that it begins keep their keys and values in 8 bits (see `int8_cache.py`). `prefill`
    ("int8" or "exact"): what long inputs do with layers of int4, see `set_prefill`. None: both as they were,
    of a new model in the model's dtype; `plain` takes the cache back. ValueError for others.
    """
    check_kind(cache)
    set_prefill(model, prefill)
    window = window_of(model)
    module: Any
    for module in model.modules():
        if is_base_model(module):
            module.cache_kind = cache or getattr(module, "cache_kind", None)
        if "forward" in vars(module):  # somebody else's, such as a hook's
            continue
        name = type(module).__name__
        if name in FORWARDS and (name != "Linear" or type(module) is nn.Linear):
            module.forward = MethodType(FORWARDS[name], module)
        elif hasattr(type(module), "attend"):
            prepare_attention(module, window)
        elif is_base_model(module) or is_causal_model(module):
            prepare_model(module)
    return model


def prepare_model(model: Any) -> None:
    """Of a base or causal model replace `forward`, or where its class wraps one of a model file (its
    `plain_class`) `plain_forward`, by which it calls that one's."""
    vars(model).setdefault(PLAN_STATE, None)
    if class_of(model) is type(model):
        model.forward = MethodType(model_forward(type(model)), model)
    elif hasattr(type(model), "plain_forward"):
        model.plain_forward = MethodType(plain_forward(class_of(model)), model)


def prepare_attention(module: Any, window: int | None) -> None:
    """Replace `attend`, and `rotate` and `qkv` where the class has them."""
    kind = type(module)
    module.attend = partial(attention, kind.attend, window)
    if hasattr(kind, "rotate"):
        module.rotate = partial(rotate, kind.rotate)
    if hasattr(kind, "qkv"):
        module.qkv = MethodType(qkv, module)


def plain(model: M) -> M:
    """Take back what `prepare` did, in place."""
    for module in model.modules():
        ours = [*FORWARDS.values(), *([model_forward(type(module))] if PLAN_STATE in vars(module) else [])]
        if any(is_forward(module, function) for function in ours):
            del module.forward
        for name in (PLAN_STATE, "plain_forward", "cache_kind"):
            vars(module).pop(name, None)
        if hasattr(type(module), "attend"):
            for name in ATTENTION_HOOKS:
                vars(module).pop(name, None)
    return model
