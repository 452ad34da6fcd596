"""What people get wrong when they write these models again, as data.

One list, for two uses: `compare` names the mistake of a port by it, and the tests make each of them to see
that a comparison notices. A mistake replaces steps of `formula.Formula`: `step=lambda f, right: wrong`, where
`f` is the formula and `right` its own step, a number or a method.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import formula
from .formula import Formula, widened

Step = Callable[[Formula, Any], Any]
ALL = "gpt_neo openai-gpt phi phi3 persimmon fuyu"
LEARNED, ROTARY, PERSIMMON = "gpt_neo openai-gpt", "phi phi3 persimmon fuyu", "persimmon fuyu"


@dataclass(frozen=True, eq=False)
class Mistake:
    name: str  # a sentence: what the port does
    fix: str  # what it should do
    families: tuple[str, ...]
    steps: dict[str, Step]
    half: bool = False  # shows in half precision only
    rounds: tuple[str, ...] = ()  # within the noise, but these stages are not what their own inputs give

    def into(self, right: Formula) -> None:
        for step, change in self.steps.items():
            setattr(right, step, change(right, getattr(right, step)))


MISTAKES: list[Mistake] = []


def mistake(families: str, name: str, fix: str, half: bool = False, rounds: str = "", **steps: Step) -> None:
    MISTAKES.append(Mistake(name, fix, tuple(families.split()), steps, half, tuple(rounds.split())))


def of(family: str) -> list[Mistake]:
    return [known for known in MISTAKES if family in known.families]


def without(families: str, *others: str) -> str:
    return " ".join(name for name in families.split() if name not in others)


# ---- Activations -------------------------------------------------------------------------------------------


def gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


SHAPES = {"the tanh approximation of GELU": formula.gelu_tanh, "GELU with the exact erf": formula.gelu_erf,
          "GELU as x sigmoid(1.702 x)": gelu_quick, "SiLU": formula.silu, "ReLU": torch.relu,
          "squared ReLU": formula.relu2}  # fmt: skip
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


def strictly(look: Tensor, T: int, S: int) -> Tensor:
    """What came before only; the very first token has nothing else than itself."""
    before = look.tril(S - T - 1)
    return before | (look & ~before.any(-1, keepdim=True))


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
    causal=lambda f, right: lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(S - T + 1),
)
mistake(
    ALL,
    "attention: a token does not see itself",
    "the mask's diagonal is S - T: tril(S - T)",
    causal=lambda f, right: lambda T, S: strictly(right(T, S), T, S),
)
mistake(
    ALL,
    "attention: no causal mask",
    "hide the keys behind each token",
    causal=lambda f, right: lambda T, S: torch.ones(T, S, dtype=torch.bool),
)
mistake(
    ALL,
    "attention: with a cache, the mask is aligned at the top left",
    "the last row sees all S keys: tril(S - T); PyTorch's is_causal counts from the first key",
    causal=lambda f, right: lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(),
)
mistake(
    ALL,
    "attention: hidden scores are set to 0",
    "set them to -inf before the softmax",
    hidden=lambda f, right: lambda scores, visible: scores.masked_fill(~visible, 0.0),
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
    softmax=lambda f, right: lambda scores, visible: f.hidden(scores, visible).softmax(2).nan_to_num(),
)
mistake(
    ALL,
    "attention: padding is not hidden",
    "hide keys whose attention_mask is 0",
    mask=lambda f, right: lambda inputs: None,
)
mistake(
    ALL,
    "attention: a row of padding sees nothing and is NaN, which reaches the others as 0 times NaN",
    "give such rows a finite score: the mask's lowest number overflows float16, -1e9 does",
    visible=lambda f, right: (
        lambda T, S, window, mask: (
            right(T, S, window, mask) & (True if mask is None else (mask != 0)[:, None, None])
        )
    ),
)
mistake(
    ALL,
    "attention: attention_mask inverted (1 hides)",
    "1 is a token, 0 padding",
    mask=lambda f, right: lambda inputs: None if right(inputs) is None else 1 - right(inputs),
)

# ---- Attention: windows ------------------------------------------------------------------------------------

for n, how in ((1, "one token too many"), (-1, "one token too few")):
    mistake(
        "gpt_neo phi3",
        f"attention: the window counts {how}",
        "a token sees `window` keys, itself counted",
        near=lambda f, right, n=n: lambda T, S, window: right(T, S, window + n),
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
    """A joint matrix cut by heads where it holds q, k and v one after the other, or the other way round."""

    def cut(joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if f.family in PERSIMMON:
            return joint.split(f.H * f.D, dim=-1)
        if f.K == f.H:
            return tuple(part.flatten(2) for part in joint.unflatten(-1, (f.H, 3, f.D)).unbind(3))
        groups = joint.unflatten(-1, (f.K, f.H // f.K + 2, f.D))  # the heads of a group, its key, its value
        return groups[..., :-2, :].flatten(2), groups[..., -2, :].flatten(2), groups[..., -1, :].flatten(2)

    return cut


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
    "attention: the joint matrix cut head by head",
    "it holds all of q, then all of k, then all of v",
    cut=in_turns,
)
mistake(
    PERSIMMON,
    "attention: the joint matrix cut into thirds",
    "it holds q, k and v of the first head, then of the second: view(B, T, H, 3, D)",
    cut=in_turns,
)
mistake(
    ALL,
    "attention: heads cut by view(B, H, T, D), without a transpose",
    "view(B, T, H, D), then swap H and T",
    heads=lambda f, right: lambda x: x.reshape(len(x), -1, x.shape[1], f.D),
)
mistake(
    ALL,
    "attention: a head takes every H-th dimension",
    "head h takes dimensions h D to (h + 1) D - 1",
    heads=lambda f, right: lambda x: x.unflatten(-1, (f.D, -1)).permute(0, 3, 1, 2),
)
mistake(
    ALL,
    "attention: heads joined without swapping H and T back",
    "transpose, then join",
    joined=lambda f, right: lambda x: x.reshape(len(x), x.shape[2], -1),
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
    spread=lambda f, right: lambda x: x.repeat(1, f.H // f.K, 1, 1),
)
mistake(
    "phi phi3",
    "attention: all heads read the first key/value head",
    "head h reads head h // (H / K)",
    spread=lambda f, right: lambda x: x[:, :1].expand(-1, f.H, -1, -1),
)
mistake(
    PERSIMMON,
    "attention: q and k without their norms",
    "norm each head before the rotation",
    head_norms=lambda f, right: False,
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
    head_norms=lambda f, right: False,
    turn_q=lambda f, right: lambda q, cos, sin: f.q_norm(right(q, cos, sin)),
    turn_k=lambda f, right: lambda k, cos, sin: f.k_norm(right(k, cos, sin)),
)


# ---- Biases ------------------------------------------------------------------------------------------------


def unbiased(*parts: str) -> Step:
    return lambda f, right: (
        lambda part, layer=None: (right(part, layer)[0], None) if part in parts else right(part, layer)
    )


for families, part, what in (
    ("phi", "q", "q"), ("phi", "v", "v"), ("openai-gpt persimmon fuyu", "joint", "q, k and v"),
    (without(ALL, "phi3"), "o", "attention's output"),
    (without(ALL, "phi3"), "up", "the MLP's first product"),
    (without(ALL, "phi3"), "down", "the MLP's last product"), ("phi", "head", "the logits"),
    ("fuyu", "patches", "the picture's projection"),
):  # fmt: skip
    mistake(families, f"bias of {what} missing", "add it", matrix=unbiased(part))

# ---- Norms -------------------------------------------------------------------------------------------------

for eps in (1e-3, 1e-4, 1e-6, 1e-12):
    mistake(ALL, f"norm: epsilon {eps:g}", "config.json says it: 1e-5", eps=lambda f, right, eps=eps: eps)


def layer_norm(outside: bool = False, ddof: int = 0, centred: bool = True, weight: bool = True) -> Step:
    def change(f, right):
        def norm(x, w, bias):
            wide = widened(x)
            wide = wide - wide.mean(-1, keepdim=True) if centred else wide
            n = x.shape[-1]
            variance = wide.square().sum(-1, keepdim=True) / (n - ddof)
            wide = wide / (variance.sqrt() + f.eps if outside else (variance + f.eps).sqrt())
            wide = wide * widened(w) if weight else wide
            return (wide if bias is None else wide + widened(bias)).to(x.dtype)

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
    final=lambda f, right: lambda x: x,
)
mistake(
    "openai-gpt",
    "norm: one before the logits",
    "GPT-1 has none behind its layers",
    final=lambda f, right: lambda x: F.layer_norm(x, x.shape[-1:], eps=f.eps),
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
    activated=lambda f, right: lambda x: right(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)),
)
mistake(
    "phi3",
    "MLP: gate and up taken in turns",
    "[gate | up]: all of gate comes first",
    activated=lambda f, right: lambda x: right(torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)),
)
mistake(
    "phi3",
    "MLP: the activation is behind the product of gate and up",
    "act(gate) * up",
    activated=lambda f, right: lambda x: f.act(x.chunk(2, dim=-1)[0] * x.chunk(2, dim=-1)[1]),
)

# ---- Embeddings and positions ------------------------------------------------------------------------------


def moved(f: Formula, places: Tensor) -> Tensor:
    """Not behind the end of a table."""
    return places if f.R else places % len(f.position_table())


mistake(
    ALL,
    "embeddings multiplied by sqrt(C)",
    "take the rows as they are",
    table=lambda f, right: lambda: right() * f.C**0.5,
)
mistake(
    ALL,
    "position_ids are not read",
    "positions are those that are given: with padding they differ",
    places=lambda f, right: lambda inputs, past: right({"input_ids": inputs["input_ids"]}, past),
)
mistake(
    ALL,
    "positions begin anew with a cache",
    "go on from the cache's length",
    places=lambda f, right: lambda inputs, past: right(inputs, 0),
)
for n, word in ((1, "one"), (2, "two (OPT)")):
    mistake(
        LEARNED,
        f"positions start at {word}",
        "they start at 0",
        places=lambda f, right, n=n: lambda inputs, past: moved(f, right(inputs, past) + n),
    )
mistake(
    LEARNED,
    "positions are not added",
    "add the row of the position table",
    position_table=lambda f, right: lambda: right() * 0,
)
mistake(
    LEARNED,
    "token_type_ids are not read",
    "add the token table's rows for them",
    types=lambda f, right: lambda ids: 0,
)
mistake(
    LEARNED,
    "token_type_ids go through the position table",
    "through the token table",
    types=lambda f, right: lambda ids: f.position_table()[moved(f, ids)],
)
mistake(
    ROTARY,
    "logits: the token table is the output matrix",
    "lm_head is one of its own",
    output_matrix=lambda f, right: lambda: (f.matrix("table")[0], right()[1]),
)

# ---- Rotary embedding --------------------------------------------------------------------------------------


def neighbours(f: Formula, right: Callable) -> Callable:
    def turn(x, cos, sin):
        a, b = x[..., : f.R // 2 * 2 : 2], x[..., 1 : f.R // 2 * 2 : 2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned, x[..., f.R // 2 * 2 :]], dim=-1)

    return turn


def mixed_tables(f: Formula, right: Callable) -> Callable:
    """Angles repeated pair by pair, halves turned."""

    def turn(x, cos, sin):
        turned, rest = x[..., : f.R // 2 * 2], x[..., f.R // 2 * 2 :]
        a, b = turned.chunk(2, dim=-1)
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        return torch.cat([turned * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)

    return turn


def last_dimensions(f: Formula, right: Callable) -> Callable:
    def turn(x, cos, sin):
        n = x.shape[-1] - f.R
        return right(x.roll(-n, -1), cos, sin).roll(n, -1)

    return turn


def powers_of(exponent: Callable) -> Step:
    """Frequencies with another exponent."""

    def change(f, right):
        def frequencies(places):
            wrong = f.base ** (exponent(f) - torch.arange(0, f.R, 2, dtype=torch.float64) / f.R)
            return right(places) / wrong

        return frequencies

    return change


def keep(f: Formula, tables: tuple) -> tuple:
    f.tables = tables
    return tables


mistake(
    ROTARY,
    "rotary: neighbours paired (GPT-J) instead of halves",
    "dimension i turns with i + R / 2; or permute the rows of q and k once",
    turn=neighbours,
)
mistake(
    ROTARY,
    "rotary: tables of neighbours, rotation of halves",
    "repeat the angles as [angles, angles]",
    turn=mixed_tables,
)
mistake(
    ROTARY,
    "rotary: turned the other way",
    "a cos - b sin, b cos + a sin",
    turn=lambda f, right: lambda x, cos, sin: right(x, cos, -sin),
)
mistake(
    ROTARY,
    "rotary: cos and sin swapped",
    "a cos - b sin, b cos + a sin",
    turn=lambda f, right: lambda x, cos, sin: right(x, sin, cos),
)
mistake(ROTARY, "rotary: only q is turned", "turn q and k", turn_k=lambda f, right: lambda k, cos, sin: k)
mistake(ROTARY, "rotary: only k is turned", "turn q and k", turn_q=lambda f, right: lambda q, cos, sin: q)
mistake(
    ROTARY,
    "rotary: v is turned too",
    "turn q and k only",
    rotation=lambda f, right: lambda *given: keep(f, right(*given)),
    remember=lambda f, right: lambda past, layer, k, v: right(past, layer, k, f.turn(v, *f.tables)),
)
mistake(ROTARY, "rotary: the last dimensions of a head are turned", "the first R are", turn=last_dimensions)
mistake(
    "phi persimmon fuyu",
    "rotary: all dimensions of a head are turned",
    "R = partial_rotary_factor times the head size",
    R=lambda f, right: f.D,
)
mistake(
    "phi persimmon fuyu",
    "rotary: one pair of dimensions too few",
    "R = partial_rotary_factor times the head size",
    R=lambda f, right: right - 2,
)
mistake(
    "phi persimmon fuyu",
    "rotary: frequencies of the whole head (exponents over D)",
    "base ** (2 i / R)",
    frequencies=powers_of(lambda f: torch.arange(0, f.R, 2, dtype=torch.float64) / f.D),
)
mistake(
    ROTARY,
    "rotary: exponents i / R, not 2 i / R",
    "base ** (2 i / R)",
    frequencies=powers_of(lambda f: torch.arange(0, f.R // 2, dtype=torch.float64) / f.R),
)
for base in (10000.0, 25000.0, 500000.0, 1000000.0):
    mistake(
        PERSIMMON if base == 1e4 else ROTARY if base > 25000 else "phi phi3",
        f"rotary: base {base:.0f}",
        "rope_theta in config.json says it",
        base=lambda f, right, base=base: base,
    )

# ---- longrope ----------------------------------------------------------------------------------------------

mistake(
    "phi3",
    "longrope: short factors beyond the limit",
    "long factors once the text is longer than it",
    factors=lambda f, right: lambda scaling, places: scaling["short_factor"],
)
mistake(
    "phi3",
    "longrope: long factors below the limit",
    "short factors up to it",
    factors=lambda f, right: lambda scaling, places: scaling["long_factor"],
)
mistake(
    "phi3",
    "longrope: long factors at the limit already",
    "they begin one token later",
    factors=lambda f, right: lambda scaling, places: right(scaling, places + 1),
)
mistake(
    "phi3",
    "longrope: long factors one token too late",
    "they begin with the first token beyond",
    factors=lambda f, right: lambda scaling, places: right(scaling, places - 1),
)
mistake(
    "phi3",
    "longrope: no factors",
    "divide each frequency by its own",
    factors=lambda f, right: lambda scaling, places: [1.0] * len(scaling["long_factor"]),
)
mistake(
    "phi3",
    "longrope: frequencies multiplied by the factors",
    "divide by them",
    factors=lambda f, right: lambda scaling, places: [1 / n for n in right(scaling, places)],
)
mistake(
    "phi3",
    "longrope: cos and sin not scaled",
    "by sqrt(1 + ln(max / original) / ln(original))",
    rotary_scale=lambda f, right: lambda: 1.0,
)
mistake(
    "phi3",
    "longrope: scores scaled once, not q and k both",
    "cos and sin of both are scaled",
    rotary_scale=lambda f, right: lambda: right() ** 0.5,
)
mistake(
    "phi3",
    "longrope: cos and sin scaled as YaRN does",
    "by sqrt(1 + ln(max / original) / ln(original))",
    rotary_scale=lambda f, right: (
        lambda: (
            1 + 0.1 * math.log(f.config.max_position_embeddings / f.config.original_max_position_embeddings)
        )
    ),
)

mistake(
    ROTARY,
    "positions start at one",
    "they start at 0; a rotation alone would not show it",
    places=lambda f, right: lambda inputs, past: right(inputs, past) + 1,
)

# ---- Pictures ----------------------------------------------------------------------------------------------


def placed(shift: int) -> Step:
    return lambda f, right: (
        lambda x, ids, inputs: right(
            x, ids, inputs | {"image_patches_indices": inputs["image_patches_indices"].roll(shift, 1)}
        )
    )


def channels_first(f: Formula, right: Callable) -> Callable:
    def with_pictures(x, ids, inputs):
        patches = inputs["image_patches"]
        patches = patches.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)
        return right(x, ids, inputs | {"image_patches": patches})

    return with_pictures


mistake(
    "fuyu",
    "pictures: patches one place late",
    "patch n stands where image_patches_indices says n",
    with_pictures=placed(1),
)
mistake(
    "fuyu",
    "pictures: patches one place early",
    "patch n stands where image_patches_indices says n",
    with_pictures=placed(-1),
)
mistake(
    "fuyu",
    "pictures: patches in reversed order",
    "patch n stands where image_patches_indices says n",
    with_pictures=lambda f, right: (
        lambda x, ids, inputs: right(x, ids, inputs | {"image_patches": inputs["image_patches"].flip(1)})
    ),
)
mistake(
    "fuyu",
    "pictures: a patch has its channels first",
    "row, column, channel: the channel counts fastest",
    with_pictures=channels_first,
)
mistake(
    "fuyu",
    "pictures: added to the words in their place",
    "a patch replaces the word there",
    with_pictures=lambda f, right: (
        lambda x, ids, inputs: torch.where(
            (inputs["image_patches_indices"] >= 0)[..., None], right(x, ids, inputs) + x, x
        )
    ),
)
mistake(
    "fuyu",
    "pictures: left out",
    "project each patch and put it in its place",
    with_pictures=lambda f, right: lambda x, ids, inputs: x,
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
    return f.table().dtype


def softmax_in_half(f: Formula, right: Callable) -> Callable:
    def softmax(scores, visible):
        scores = f.hidden(scores.to(half_of(f)), visible)
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
        lambda places, dtype: places[:, None, :, None].to(dtype) * f.frequencies(places).to(dtype)
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
