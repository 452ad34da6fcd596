"""Mistakes of pictures, of the loss and of half precision."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formula import Formula
from .layers import layer_norm
from .table import ALL, ROTARY, Step, mistake

# ---- Pictures ----------------------------------------------------------------------------------------------


def placed(shift: int) -> Step:
    return lambda f, right: (
        lambda x, ids, inputs: right(
            x, ids, inputs | {"image_patches_indices": inputs["image_patches_indices"].roll(shift, 1)}
        )
    )


def channels_first(f: Formula, right: Callable) -> Callable:
    def put_patches(x, ids, inputs):
        patches = inputs["image_patches"]
        patches = patches.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)
        return right(x, ids, inputs | {"image_patches": patches})

    return put_patches


mistake(
    "fuyu",
    "pictures: patches one place late",
    "patch n stands where image_patches_indices says n",
    put_patches=placed(1),
)
mistake(
    "fuyu",
    "pictures: patches one place early",
    "patch n stands where image_patches_indices says n",
    put_patches=placed(-1),
)
mistake(
    "fuyu",
    "pictures: patches in reversed order",
    "patch n stands where image_patches_indices says n",
    put_patches=lambda f, right: (
        lambda x, ids, inputs: right(x, ids, inputs | {"image_patches": inputs["image_patches"].flip(1)})
    ),
)
mistake(
    "fuyu",
    "pictures: a patch has its channels first",
    "row, column, channel: the channel counts fastest",
    put_patches=channels_first,
)
mistake(
    "fuyu",
    "pictures: added to the words in their place",
    "a patch replaces the word there",
    put_patches=lambda f, right: (
        lambda x, ids, inputs: torch.where(
            (inputs["image_patches_indices"] >= 0)[..., None], right(x, ids, inputs) + x, x
        )
    ),
)
mistake(
    "fuyu",
    "pictures: left out",
    "project each patch and put it in its place",
    put_patches=lambda f, right: lambda x, ids, inputs: x,
)

# ---- Loss --------------------------------------------------------------------------------------------------

mistake(
    ALL,
    "loss: labels are not shifted",
    "logits[:, :-1] with labels[:, 1:]",
    loss=lambda f, right: lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
)
mistake(
    ALL,
    "loss: shifted twice",
    "logits[:, :-1] with labels[:, 1:]",
    loss=lambda f, right: lambda logits, labels: right(logits[:, :-1], labels[:, 1:]),
)
mistake(
    ALL,
    "loss: summed, not averaged",
    "the mean over labels that are not -100",
    loss=lambda f, right: lambda logits, labels: right(logits, labels) * (labels[:, 1:] != -100).sum(),
)
mistake(
    ALL,
    "loss: labels of -100 count in the mean",
    "the mean over labels that are not -100",
    loss=lambda f, right: (
        lambda logits, labels: right(logits, labels) * (labels[:, 1:] != -100).sum() / labels[:, 1:].numel()
    ),
)

# ---- Half precision ----------------------------------------------------------------------------------------


def half_of(f: Formula) -> torch.dtype:
    return f.embedding().dtype


def softmax_in_half(f: Formula, right: Callable) -> Callable:
    def softmax(scores, visible):
        scores = f.masked(scores.to(half_of(f)), visible)
        powers, total = (scores - scores.amax(-1, keepdim=True)).exp(), 0
        for power in powers.unbind(-1):
            total = total + power
        return powers / total[..., None]

    return softmax


mistake(
    ROTARY,
    "half precision: rotary angles are computed in it",
    "compute them in float32, round cos and sin",
    half=True,
    angles=lambda f, right: (
        lambda position_ids, dtype: (
            position_ids[:, None, :, None].to(dtype) * f.inv_freq(position_ids).to(dtype)
        )
    ),
)
mistake(
    ALL,
    "half precision: the squares of a norm are computed in it",
    "compute them in float32: they overflow float16",
    half=True,
    norm=lambda f, right: lambda x, w, bias: norm_in_half(f, x, w, bias),
)
mistake(
    "phi3",
    "half precision: the norm is rounded after its weight",
    "round, then multiply by the weight",
    half=True,
    rounds="attn_in mlp_in norm",
    norm=layer_norm(centred=False),
)
mistake(
    ALL,
    "half precision: the softmax is computed in it",
    "compute it in float32, round the weights",
    half=True,
    rounds="weights",
    softmax=softmax_in_half,
)


def norm_in_half(f: Formula, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    y = x * ((x * x).mean(-1, keepdim=True) + f.eps).rsqrt() * w
    return y if bias is None else y + bias
