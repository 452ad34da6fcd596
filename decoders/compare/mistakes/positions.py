"""Mistakes of embeddings, positions and the rotary embedding."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..formula import Formula
from .table import ALL, LEARNED, PERSIMMON, ROTARY, Step, mistake

# ---- Embeddings and positions ------------------------------------------------------------------------------


def moved(f: Formula, position_ids: Tensor) -> Tensor:
    """Not behind the end of a table."""
    return position_ids if f.R else position_ids % len(f.position_embedding())


mistake(
    ALL,
    "embeddings multiplied by sqrt(C)",
    "take the rows as they are",
    embedding=lambda f, right: lambda: right() * f.C**0.5,
)
mistake(
    ALL,
    "position_ids are not read",
    "positions are those that are given: with padding they differ",
    position_ids=lambda f, right: lambda inputs, past: right({"input_ids": inputs["input_ids"]}, past),
)
mistake(
    ALL,
    "positions begin anew with a cache",
    "go on from the cache's length",
    position_ids=lambda f, right: lambda inputs, past: right(inputs, 0),
)
for n, word in ((1, "one"), (2, "two (OPT)")):
    mistake(
        LEARNED,
        f"positions start at {word}",
        "they start at 0",
        position_ids=lambda f, right, n=n: lambda inputs, past: moved(f, right(inputs, past) + n),
    )
mistake(
    LEARNED,
    "positions are not added",
    "add the row of the position table",
    position_embedding=lambda f, right: lambda: right() * 0,
)
mistake(
    LEARNED,
    "token_type_ids are not read",
    "add the token table's rows for them",
    token_types=lambda f, right: lambda ids: 0,
)
mistake(
    LEARNED,
    "token_type_ids go through the position table",
    "through the token table",
    token_types=lambda f, right: lambda ids: f.position_embedding()[moved(f, ids)],
)
mistake(
    ROTARY,
    "logits: the token table is the output matrix",
    "lm_head is one of its own",
    output_matrix=lambda f, right: lambda: (f.matrix("embedding")[0], right()[1]),
)

# ---- Rotary embedding --------------------------------------------------------------------------------------


def neighbours(f: Formula, right: Callable) -> Callable:
    def rotate(x, cos, sin):
        a, b = x[..., : f.R // 2 * 2 : 2], x[..., 1 : f.R // 2 * 2 : 2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned, x[..., f.R // 2 * 2 :]], dim=-1)

    return rotate


def mixed_tables(f: Formula, right: Callable) -> Callable:
    """Angles repeated pair by pair, halves turned."""

    def rotate(x, cos, sin):
        turned, rest = x[..., : f.R // 2 * 2], x[..., f.R // 2 * 2 :]
        a, b = turned.chunk(2, dim=-1)
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        return torch.cat([turned * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)

    return rotate


def last_dimensions(f: Formula, right: Callable) -> Callable:
    def rotate(x, cos, sin):
        n = x.shape[-1] - f.R
        return right(x.roll(-n, -1), cos, sin).roll(n, -1)

    return rotate


def powers_of(exponent: Callable) -> Step:
    """Frequencies with another exponent."""

    def change(f, right):
        def inv_freq(position_ids):
            wrong = f.base ** (exponent(f) - torch.arange(0, f.R, 2, dtype=torch.float64) / f.R)
            return right(position_ids) / wrong

        return inv_freq

    return change


def keep(f: Formula, tables: tuple) -> tuple:
    f.tables = tables
    return tables


mistake(
    ROTARY,
    "rotary: neighbours paired (GPT-J) instead of halves",
    "dimension i turns with i + R / 2; or permute the rows of q and k once",
    rotate=neighbours,
)
mistake(
    ROTARY,
    "rotary: tables of neighbours, rotation of halves",
    "repeat the angles as [angles, angles]",
    rotate=mixed_tables,
)
mistake(
    ROTARY,
    "rotary: turned the other way",
    "a cos - b sin, b cos + a sin",
    rotate=lambda f, right: lambda x, cos, sin: right(x, cos, -sin),
)
mistake(
    ROTARY,
    "rotary: cos and sin swapped",
    "a cos - b sin, b cos + a sin",
    rotate=lambda f, right: lambda x, cos, sin: right(x, sin, cos),
)
mistake(ROTARY, "rotary: only q is turned", "turn q and k", rotate_k=lambda f, right: lambda k, cos, sin: k)
mistake(ROTARY, "rotary: only k is turned", "turn q and k", rotate_q=lambda f, right: lambda q, cos, sin: q)
mistake(
    ROTARY,
    "rotary: v is turned too",
    "turn q and k only",
    cos_sin=lambda f, right: lambda *given: keep(f, right(*given)),
    update_cache=lambda f, right: lambda cache, layer, k, v: right(cache, layer, k, f.rotate(v, *f.tables)),
)
mistake(ROTARY, "rotary: the last dimensions of a head are turned", "the first R are", rotate=last_dimensions)
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
    inv_freq=powers_of(lambda f: torch.arange(0, f.R, 2, dtype=torch.float64) / f.D),
)
mistake(
    ROTARY,
    "rotary: exponents i / R, not 2 i / R",
    "base ** (2 i / R)",
    inv_freq=powers_of(lambda f: torch.arange(0, f.R // 2, dtype=torch.float64) / f.R),
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
    rope_factors=lambda f, right: lambda scaling, position_ids: scaling["short_factor"],
)
mistake(
    "phi3",
    "longrope: long factors below the limit",
    "short factors up to it",
    rope_factors=lambda f, right: lambda scaling, position_ids: scaling["long_factor"],
)
mistake(
    "phi3",
    "longrope: long factors at the limit already",
    "they begin one token later",
    rope_factors=lambda f, right: lambda scaling, position_ids: right(scaling, position_ids + 1),
)
mistake(
    "phi3",
    "longrope: long factors one token too late",
    "they begin with the first token beyond",
    rope_factors=lambda f, right: lambda scaling, position_ids: right(scaling, position_ids - 1),
)
mistake(
    "phi3",
    "longrope: no factors",
    "divide each frequency by its own",
    rope_factors=lambda f, right: lambda scaling, position_ids: [1.0] * len(scaling["long_factor"]),
)
mistake(
    "phi3",
    "longrope: frequencies multiplied by the factors",
    "divide by them",
    rope_factors=lambda f, right: lambda scaling, position_ids: [1 / n for n in right(scaling, position_ids)],
)
mistake(
    "phi3",
    "longrope: cos and sin not scaled",
    "by sqrt(1 + ln(max / original) / ln(original))",
    attention_factor=lambda f, right: lambda: 1.0,
)
mistake(
    "phi3",
    "longrope: scores scaled once, not q and k both",
    "cos and sin of both are scaled",
    attention_factor=lambda f, right: lambda: right() ** 0.5,
)
mistake(
    "phi3",
    "longrope: cos and sin scaled as YaRN does",
    "by sqrt(1 + ln(max / original) / ln(original))",
    attention_factor=lambda f, right: (
        lambda: (
            1 + 0.1 * math.log(f.config.max_position_embeddings / f.config.original_max_position_embeddings)
        )
    ),
)

mistake(
    ROTARY,
    "positions start at one",
    "they start at 0; a rotation alone would not show it",
    position_ids=lambda f, right: lambda inputs, past: right(inputs, past) + 1,
)
