"""What kernels replace on a loaded model, and how it is taken back.

| module | attribute | by |
|---|---|---|
| `nn.Linear` | `forward` | `linear.linear_forward` |
| `Conv1D` (GPT-1) | `forward` | `linear.conv1d_forward` |
| `RMSNorm` (Phi-3) | `forward` | `linear.rms_norm_forward` |
| an attention module | `attend(q, k, v, mask, scale, ...)` | `attention.attention` |
| the same, where it has it | `rotate(x, cos, sin)` | `attention.rotate` |
| the same, where it has it | `qkv(x)` | `attention.qkv` |
| a base model, such as `PhiModel` | `forward` | `texts.base_forward` |

All of these compute the same, for inference on a CPU. Each looks at every call: where PyTorch has to see the
plain operations (see `conditions.py`) it runs them. No global setting is touched, so threads may share a
model. An attention module is one whose class has `attend`, a base model one with a list of layers.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch.nn as nn

from .attention import attention, is_forward, qkv, rotate, window_of
from .linear import conv1d_forward, linear_forward, rms_norm_forward
from .texts import base_forward, is_base_model

M = TypeVar("M", bound=nn.Module)

FORWARDS = {"Linear": linear_forward, "Conv1D": conv1d_forward, "RMSNorm": rms_norm_forward}
ATTENTION_HOOKS = ("attend", "rotate", "qkv")


def prepare(model: M) -> M:
    """Put the kernels under `model`, in place. Parameters, names and types of modules stay."""
    window = window_of(model)
    module: Any
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's, such as a hook's
            continue
        name = type(module).__name__
        if name in FORWARDS and (name != "Linear" or type(module) is nn.Linear):
            module.forward = MethodType(FORWARDS[name], module)
        elif hasattr(type(module), "attend"):
            prepare_attention(module, window)
        elif is_base_model(module):
            module.forward = MethodType(own_forward(module), module)
    return model


def own_forward(base_model: Any) -> Callable:
    """The `forward` for a base model of this class."""
    return base_forward(type(base_model))  # type: ignore[arg-type]


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
        ours = [own_forward(module)] if is_base_model(module) else FORWARDS.values()
        if any(is_forward(module, function) for function in ours):
            del module.forward
            vars(module).pop("step_state", None)
        if hasattr(type(module), "attend"):
            for name in ATTENTION_HOOKS:
                vars(module).pop(name, None)
    return model
