"""Mistakes of biases, norms and the layer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..arithmetic import upcast
from ..formula import Formula
from .table import ALL, Step, mistake, without

# ---- Biases ------------------------------------------------------------------------------------------------


def unbiased(*parts: str) -> Step:
    return lambda f, right: (
        lambda part, layer=None: (right(part, layer)[0], None) if part in parts else right(part, layer)
    )


for families, part, what in (
    ("phi", "q", "q"), ("phi", "v", "v"), ("openai-gpt persimmon fuyu", "qkv", "q, k and v"),
    (without(ALL, "phi3"), "o", "attention's output"),
    (without(ALL, "phi3"), "up", "the MLP's first product"),
    (without(ALL, "phi3"), "down", "the MLP's last product"), ("phi", "head", "the logits"),
    ("fuyu", "patches", "the picture's projection"),
):  # fmt: skip
    mistake(families, f"bias of {what} missing", "add it", matrix=unbiased(part))

# ---- Norms -------------------------------------------------------------------------------------------------

for eps in (1e-3, 1e-4, 1e-6, 1e-12):
    fix = "1e-5, unless config.json has another (..._eps, ..._epsilon)"
    mistake(ALL, f"norm: epsilon {eps:g}", fix, eps=lambda f, right, eps=eps: eps)


def layer_norm(outside: bool = False, ddof: int = 0, centred: bool = True, weight: bool = True) -> Step:
    def change(f, right):
        def norm(x, w, bias):
            wide = upcast(x)
            wide = wide - wide.mean(-1, keepdim=True) if centred else wide
            n = x.shape[-1]
            variance = wide.square().sum(-1, keepdim=True) / (n - ddof)
            wide = wide / (variance.sqrt() + f.eps if outside else (variance + f.eps).sqrt())
            wide = wide * upcast(w) if weight else wide
            return (wide if bias is None else wide + upcast(bias)).to(x.dtype)

        return norm

    return change


mistake(ALL, "norm: epsilon added behind the root", "1 / sqrt(variance + eps)", norm=layer_norm(outside=True))
mistake(without(ALL, "phi3"), "norm: variance divided by n - 1", "divide by n", norm=layer_norm(ddof=1))
mistake(
    without(ALL, "phi3"),
    "norm: no mean subtracted (RMSNorm)",
    "LayerNorm subtracts the mean",
    norm=layer_norm(centred=False),
)
mistake("phi3", "norm: mean subtracted (LayerNorm)", "RMSNorm does not", norm=layer_norm())
mistake(
    "phi3",
    "norm: sum of squares, not their mean",
    "divide by n",
    norm=lambda f, right: lambda x, w, bias: w * x * (x.square().sum(-1, keepdim=True) + f.eps).rsqrt(),
)
mistake(
    ALL,
    "norm: weights left out",
    "multiply by them",
    norm=lambda f, right: lambda x, w, bias: right(x, torch.ones_like(w), bias),
)
mistake(
    ALL,
    "norm: weights counted from one (1 + weight, as in Gemma)",
    "multiply by the weight itself",
    norm=lambda f, right: lambda x, w, bias: right(x, 1 + w, bias),
)
mistake(
    without(ALL, "phi3"),
    "norm: biases left out",
    "add them",
    norm=lambda f, right: lambda x, w, bias: right(x, w, torch.zeros_like(bias)),
)
mistake(
    "gpt_neo openai-gpt phi3 persimmon fuyu",
    "norm: a layer's two norms swapped",
    "see their names",
    normed=lambda f, right: (
        lambda x, part, layer=None: right(x, {"norm_1": "norm_2", "norm_2": "norm_1"}.get(part, part), layer)
    ),
)
mistake(
    without(ALL, "openai-gpt"),
    "norm: none before the logits",
    "one follows the last layer",
    final_norm=lambda f, right: lambda x: x,
)
mistake(
    "openai-gpt",
    "norm: one before the logits",
    "GPT-1 has none behind its layers",
    final_norm=lambda f, right: lambda x: F.layer_norm(x, x.shape[-1:], eps=f.eps),
)

# ---- The layer ---------------------------------------------------------------------------------------------


def in_order(f: Formula, right: Callable) -> Callable:
    def layer(x, i, attend):
        x = f.add_attn(x, attend(f.normed(x, "norm_1", i), i))
        return f.add_mlp(x, f.mlp(f.normed(x, "norm_2", i), i))

    return layer


def side_by_side(f: Formula, right: Callable) -> Callable:
    def layer(x, i, attend):
        y = f.add_attn(x, attend(f.normed(x, "norm_1", i), i))
        return f.add_mlp(y, f.mlp(f.normed(x, "norm_2", i), i))

    return layer


def norms_after(f: Formula, right: Callable) -> Callable:
    def layer(x, i, attend):
        x = f.normed(f.add_attn(x, attend(x, i)), "norm_1", i)
        return f.normed(f.add_mlp(x, f.mlp(x, i)), "norm_2", i)

    return layer


def sums_of_norms(f: Formula, right: Callable) -> Callable:
    def layer(x, i, attend):
        n = f.normed(x, "norm_1", i)
        if f.family == "phi":
            return f.add_mlp(f.add_attn(n, attend(n, i)), f.mlp(n, i))
        n = f.normed(f.add_attn(n, attend(n, i)), "norm_2", i)
        return f.add_mlp(n, f.mlp(n, i))

    return layer


mistake(
    "phi", "layer: attention first, the MLP on its sum", "both read the same normed input", layer=in_order
)
mistake(
    "gpt_neo phi3 persimmon fuyu",
    "layer: attention and MLP side by side",
    "the MLP reads the sum behind attention",
    layer=side_by_side,
)
mistake(
    "openai-gpt",
    "layer: norms before attention and MLP (GPT-2)",
    "GPT-1's norms come behind the sums",
    layer=in_order,
)
mistake(
    "gpt_neo phi3 persimmon fuyu",
    "layer: norms behind the sums (GPT-1)",
    "before attention and MLP",
    layer=norms_after,
)
mistake(
    without(ALL, "openai-gpt"),
    "layer: the normed input is added, not the input itself",
    "keep what came in and add to that",
    layer=sums_of_norms,
)
mistake(
    ALL, "layer: attention's input is not added", "x + attention", add_attn=lambda f, right: lambda x, y: y
)
mistake(
    without(ALL, "phi"),
    "layer: the MLP's input is not added",
    "x + MLP",
    add_mlp=lambda f, right: lambda x, y: y,
)
mistake(
    "phi",
    "layer: the MLP's result is not added",
    "x + attention + MLP",
    add_mlp=lambda f, right: lambda x, y: x,
)
mistake(
    ALL,
    "layer: the last one is missing",
    "config.json says how many there are",
    layers=lambda f, right: right[:-1],
)
mistake(ALL, "layer: they run in reversed order", "from 0 on", layers=lambda f, right: right[::-1])
mistake(
    ALL,
    "layer: all have the first one's weights",
    "layer i has its own",
    module=lambda f, right: lambda part, layer=None: right(part, None if layer is None else 0),
)
mistake(
    "phi3",
    "MLP: gate and up swapped",
    "gate comes first: act(gate) * up",
    apply_act=lambda f, right: lambda x: right(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)),
)
mistake(
    "phi3",
    "MLP: gate and up taken in turns",
    "[gate | up]: all of gate comes first",
    apply_act=lambda f, right: lambda x: right(torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)),
)
mistake(
    "phi3",
    "MLP: the activation is behind the product of gate and up",
    "act(gate) * up",
    apply_act=lambda f, right: lambda x: f.act(x.chunk(2, dim=-1)[0] * x.chunk(2, dim=-1)[1]),
)
