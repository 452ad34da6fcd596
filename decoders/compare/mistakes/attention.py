"""Mistakes of activations and of attention: scores, mask, softmax, windows, heads."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..arithmetic import gelu_erf, gelu_tanh, relu2, silu
from ..formula import Formula
from .table import ALL, PERSIMMON, Step, mistake, without

# ---- Activations -------------------------------------------------------------------------------------------


def gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


SHAPES = {
    "the tanh approximation of GELU": gelu_tanh,
    "GELU with the exact erf": gelu_erf,
    "GELU as x sigmoid(1.702 x)": gelu_quick,
    "SiLU": silu,
    "ReLU": torch.relu,
    "squared ReLU": relu2,
}
for families, own in (
    ("gpt_neo openai-gpt phi", "the tanh approximation of GELU"),
    ("phi3", "SiLU"),
    (PERSIMMON, "squared ReLU"),
):
    for other, function in SHAPES.items():
        if other != own:
            mistake(
                families,
                f"activation: {other} where this model has {own}",
                f"use {own}",
                act=lambda f, right, function=function: function,
            )
mistake(ALL, "activation: none", "apply it to the first product of the MLP", act=lambda f, right: lambda x: x)

# ---- Attention: scores, mask, softmax ----------------------------------------------------------------------


def strictly(visible: Tensor, T: int, S: int) -> Tensor:
    """What came before only; the very first token has nothing else than itself."""
    before = visible.tril(S - T - 1)
    return before | (visible & ~before.any(-1, keepdim=True))


mistake(
    "gpt_neo",
    "attention: scores divided by sqrt(D), which GPT-Neo does not",
    "leave them as they are",
    scale=lambda f, right: f.D**-0.5,
)
mistake(
    without(ALL, "gpt_neo"),
    "attention: scores not divided by sqrt(D)",
    "divide them by sqrt(head size)",
    scale=lambda f, right: 1.0,
)
mistake(
    ALL,
    "attention: scores divided by D, not by its root",
    "see `scores` in KIT.md",
    scale=lambda f, right: 1 / f.D,
)
mistake(
    ALL,
    "attention: scores divided by the root of the width C",
    "see `scores` in KIT.md",
    scale=lambda f, right: f.C**-0.5,
)
mistake(
    ALL,
    "attention: a token sees the one after it",
    "the mask's diagonal is S - T: tril(S - T)",
    causal_mask=lambda f, right: lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(S - T + 1),
)
mistake(
    ALL,
    "attention: a token does not see itself",
    "the mask's diagonal is S - T: tril(S - T)",
    causal_mask=lambda f, right: lambda T, S: strictly(right(T, S), T, S),
)
mistake(
    ALL,
    "attention: no causal mask",
    "hide the keys behind each token",
    causal_mask=lambda f, right: lambda T, S: torch.ones(T, S, dtype=torch.bool),
)
mistake(
    ALL,
    "attention: with a cache, the mask is aligned at the top left",
    "the last row sees all S keys: tril(S - T); PyTorch's is_causal counts from the first key",
    causal_mask=lambda f, right: lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(),
)
mistake(
    ALL,
    "attention: hidden scores are set to 0",
    "set them to -inf before the softmax",
    masked=lambda f, right: lambda scores, visible: scores.masked_fill(~visible, 0.0),
)
mistake(
    ALL,
    "attention: hidden weights are set to 0 behind the softmax",
    "hide the scores before it",
    softmax=lambda f, right: lambda scores, visible: scores.softmax(-1) * visible,
)
mistake(
    ALL,
    "attention: softmax over the queries",
    "over the last axis, the keys",
    softmax=lambda f, right: lambda scores, visible: f.masked(scores, visible).softmax(2).nan_to_num(),
)
mistake(
    ALL,
    "attention: padding is not hidden",
    "hide keys whose attention_mask is 0",
    attention_mask=lambda f, right: lambda inputs: None,
)
mistake(
    ALL,
    "attention: a row of padding sees nothing and is NaN, which reaches the others as 0 times NaN",
    "give such rows a finite score: the mask's lowest number overflows float16, -1e9 does",
    visible=lambda f, right: (
        lambda T, S, window, attention_mask: (
            right(T, S, window, attention_mask)
            & (True if attention_mask is None else (attention_mask != 0)[:, None, None])
        )
    ),
)
mistake(
    ALL,
    "attention: attention_mask inverted (1 hides)",
    "1 is a token, 0 padding",
    attention_mask=lambda f, right: lambda inputs: None if right(inputs) is None else 1 - right(inputs),
)

# ---- Attention: windows ------------------------------------------------------------------------------------

for n, how in ((1, "one token too many"), (-1, "one token too few")):
    mistake(
        "gpt_neo phi3",
        f"attention: the window counts {how}",
        "a token sees `window` keys, itself counted",
        in_window=lambda f, right, n=n: lambda T, S, window: right(T, S, window + n),
    )
mistake(
    "gpt_neo phi3",
    "attention: no window",
    "see window_size and sliding_window in config.json",
    windows=lambda f, right: [None] * len(right),
)
mistake(
    "gpt_neo",
    "attention: every layer is local",
    "attention_layers says which are",
    windows=lambda f, right: [max(w or 0 for w in right)] * len(right),
)
mistake(
    "gpt_neo",
    "attention: global and local layers swapped",
    "the first is global",
    windows=lambda f, right: [None if w else max(w or 0 for w in right) for w in right],
)

# ---- Attention: q, k, v and heads --------------------------------------------------------------------------


def swapped(a: int, b: int) -> Step:
    def change(f, right):
        def qkv(x, layer):
            parts = list(right(x, layer))
            parts[a], parts[b] = parts[b], parts[a]
            return tuple(parts)

        return qkv

    return change


def in_turns(f: Formula, right: Callable) -> Callable:
    """A fused matrix cut by heads where it holds q, k and v one after the other, or the other way round."""

    def split_qkv(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if f.family in PERSIMMON:
            return fused.split(f.H * f.D, dim=-1)
        if f.K == f.H:
            return tuple(part.flatten(2) for part in fused.unflatten(-1, (f.H, 3, f.D)).unbind(3))
        groups = fused.unflatten(-1, (f.K, f.H // f.K + 2, f.D))  # the heads of a group, its key, its value
        return groups[..., :-2, :].flatten(2), groups[..., -2, :].flatten(2), groups[..., -1, :].flatten(2)

    return split_qkv


def transposed(part: str) -> Step:
    def change(f, right):
        def matrix(name, layer=None):
            weight, bias = right(name, layer)
            return (weight.t() if name == part and weight.shape[0] == weight.shape[1] else weight), bias

        return matrix

    return change


mistake(
    "gpt_neo openai-gpt persimmon fuyu",
    "attention: q and k swapped",
    "see the order of q, k and v",
    qkv=swapped(0, 1),
)
mistake(ALL, "attention: k and v swapped", "see the order of q, k and v", qkv=swapped(1, 2))
mistake(
    "openai-gpt phi3",
    "attention: the fused matrix cut head by head",
    "it holds all of q, then all of k, then all of v",
    split_qkv=in_turns,
)
mistake(
    PERSIMMON,
    "attention: the fused matrix cut into thirds",
    "it holds q, k and v of the first head, then of the second: view(B, T, H, 3, D)",
    split_qkv=in_turns,
)
mistake(
    ALL,
    "attention: heads cut by view(B, H, T, D), without a transpose",
    "view(B, T, H, D), then swap H and T",
    split_heads=lambda f, right: lambda x: x.reshape(len(x), -1, x.shape[1], f.D),
)
mistake(
    ALL,
    "attention: a head takes every H-th dimension",
    "head h takes dimensions h D to (h + 1) D - 1",
    split_heads=lambda f, right: lambda x: x.unflatten(-1, (f.D, -1)).permute(0, 3, 1, 2),
)
mistake(
    ALL,
    "attention: heads joined without swapping H and T back",
    "transpose, then join",
    merge_heads=lambda f, right: lambda x: x.reshape(len(x), x.shape[2], -1),
)
mistake(
    ALL,
    "attention: the output matrix is transposed",
    "y = x W^T + b; GPT-1's files hold W^T",
    matrix=transposed("o"),
)
mistake("gpt_neo phi", "attention: the matrix of q is transposed", "y = x W^T + b", matrix=transposed("q"))
mistake("gpt_neo", "attention: the matrix of k is transposed", "y = x W^T + b", matrix=transposed("k"))
mistake("gpt_neo", "attention: the matrix of v is transposed", "y = x W^T + b", matrix=transposed("v"))
mistake(
    "phi phi3",
    "attention: key/value heads taken in turns",
    "head h reads key/value head h // (H / K)",
    repeat_kv=lambda f, right: lambda x: x.repeat(1, f.H // f.K, 1, 1),
)
mistake(
    "phi phi3",
    "attention: all heads read the first key/value head",
    "head h reads head h // (H / K)",
    repeat_kv=lambda f, right: lambda x: x[:, :1].expand(-1, f.H, -1, -1),
)
mistake(
    PERSIMMON,
    "attention: q and k without their norms",
    "norm each head before the rotation",
    qk_layernorm=lambda f, right: False,
)
mistake(
    PERSIMMON,
    "attention: q's norm on k and k's on q",
    "each has its own",
    q_norm=lambda f, right: f.k_norm,
    k_norm=lambda f, right: Formula.q_norm.__get__(f),
)
mistake(PERSIMMON, "attention: q normed, k not", "norm both", k_norm=lambda f, right: lambda k: k)
mistake(
    PERSIMMON,
    "attention: heads normed after the rotation",
    "norm each head, then turn it",
    qk_layernorm=lambda f, right: False,
    rotate_q=lambda f, right: lambda q, cos, sin: f.q_norm(right(q, cos, sin)),
    rotate_k=lambda f, right: lambda k, cos, sin: f.k_norm(right(k, cos, sin)),
)
