"""How two runs differ, as JSON has it."""

import math
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from .content import rounded
from .traces import Trace


def compared(a: Trace, b: Trace, first: dict, second: dict, alike: bool) -> dict[str, Any]:
    """How two runs differ, at tokens that both have: the same place where the texts are of one length, else
    where they say the same. `alike`: one vocabulary serves both."""
    x, y = ([each["words"][id].strip() for id in each["ids"]] for each in (first, second))
    if len(x) == len(y) and alike:
        pairs = list(zip(range(len(x)), range(len(y)), strict=True))
    else:
        blocks = SequenceMatcher(None, x, y, autojunk=False).get_matching_blocks()
        pairs = [(m.a + i, m.b + i) for m in blocks for i in range(m.size)]
    difference: dict[str, Any] = {"pairs": pairs, "remarks": []}
    if not pairs:
        difference["remarks"].append("The two texts have no token in common")
        return difference
    at = tuple(torch.tensor(side) for side in zip(*pairs, strict=True))
    same_size = (len(a.f.layers), a.f.C) == (len(b.f.layers), b.f.C)
    same_heads = (len(a.f.layers), a.f.H) == (len(b.f.layers), b.f.H)
    if alike and a["logits"].shape[-1] == b["logits"].shape[-1]:
        difference["bits"] = divergence(a, b, at)
    else:
        difference["remarks"].append("The models have other vocabularies, so their chances are not compared")
    if alike and same_size:
        difference["residual"] = residual_distance(a, b, at)
    else:
        difference["remarks"].append(
            "The models have other sizes or vocabularies, so their residual streams are not compared"
        )
    if len(x) == len(y) == len(pairs) and same_heads:
        difference["heads"] = moved_attention(a, b)
    else:
        difference["remarks"].append(
            "The texts have other lengths, or the models other heads, so attention is not subtracted"
        )
    difference["writers"] = alike and first["writers"]["names"] == second["writers"]["names"]
    return difference


def divergence(a: Trace, b: Trace, at: tuple[Tensor, Tensor]) -> list:
    """Kullback-Leibler divergence of the next tokens' chances, in bits, at each pair of tokens."""
    p, q = (t["logits"][0, i].double().log_softmax(-1) for t, i in zip((a, b), at, strict=True))
    return rounded((p.exp() * (p - q)).nan_to_num(0).sum(-1) / math.log(2))


def residual_distance(a: Trace, b: Trace, at: tuple[Tensor, Tensor]) -> list:
    """(L + 1, pairs) length of the difference of the residual streams, by the length of the first."""
    names = ["embeddings", *(f"layers.{i}.out" for i in a.f.layers)]
    u, v = (torch.stack([t[n][0, i].double() for n in names]) for t, i in zip((a, b), at, strict=True))
    return rounded((u - v).norm(dim=-1) / u.norm(dim=-1))


def moved_attention(a: Trace, b: Trace) -> list | None:
    """(L, H) share of attention that the second gives to other keys, mean over the text."""
    apart = [
        (a[n] - b[n])[0].abs().double().sum(-1).mean(-1) / 2
        for n in (f"layers.{i}.weights" for i in a.f.layers)
        if a[n].shape == b[n].shape
    ]
    return rounded(torch.stack(apart)) if apart else None
