"""Hooks on a model's modules, and around its attention function, that hear every value of a pass.

The attention function hands out no scores: these are computed beside it, by the formula that it documents.
So the logits are those of the plain pass, bit for bit. While a model is tapped no other thread may run it.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders.compare.formula import Formula, upcast

from .changes import Change

Note = Callable[[str, Tensor], Tensor]  # hears a value, and gives that with which the pass goes on


class Taps:
    """While it is open (`with`), every pass of `model` tells its values to `note` as they are computed."""

    def __init__(self, model: nn.Module, f: Formula, note: Note, with_scores: bool):
        self.model, self.f, self.note, self.with_scores = model, f, note, with_scores
        self.undo = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as self.undo:
            f = self.f
            self.on_input(f"{f.parts['layers']}.0", "embeddings")
            for i in f.layers:
                self.tap(i)
            self.on_input(f.module("head"), "norm")
            self.on_output(f.module("head"), "logits")
            self.undo = self.undo.pop_all()  # from here on it is __exit__ that takes the hooks away

    def __exit__(self, *error: object) -> None:
        self.undo.close()

    def on_input(self, module: str, name: str | None, change: Callable | None = None) -> None:
        def hook(_: nn.Module, args: tuple) -> tuple | None:
            new = change(args[0]) if change else self.note(name, args[0])
            return None if new is args[0] else (new, *args[1:])

        self.undo.callback(self.model.get_submodule(module).register_forward_pre_hook(hook).remove)

    def on_output(
        self,
        module: str,
        name: str | None = None,
        there: Change | None = None,
        back: Change | None = None,
        change: Callable | None = None,
    ) -> None:
        """`there` gives the value the shape of its stage, `back` that of the module."""

        def hook(_: nn.Module, args: tuple, output: Any) -> Any:
            if change:
                return change(output)
            seen = there(output) if there else output
            new = self.note(name, seen)
            return None if new is seen else back(new) if back else new

        self.undo.callback(self.model.get_submodule(module).register_forward_hook(hook).remove)

    def tap(self, i: int) -> None:
        """Layer i. What is replaced goes on in the way in which the layer itself would have used it."""
        f, start = self.f, f"layers.{i}."
        if "qkv" in f.parts:
            self.on_input(f.module("qkv", i), f"{start}attn_in")
            self.on_output(f.module("qkv", i), change=lambda output: self.cut(start, output))
        else:
            read: list[Tensor] = []  # by q, and so by k and v: told once

            def attn_in(x: Tensor) -> Tensor:
                read[:] = [self.note(f"{start}attn_in", x)]
                return read[0]

            for part in "qkv":
                self.on_input(f.module(part, i), None, attn_in if part == "q" else lambda x: read[0])
                self.on_output(f.module(part, i), start + part, f.split_heads, f.merge_heads)
        if f.qk_layernorm:
            for part in "qk":
                self.on_output(f.module(f"{part}_norm", i), f"{start}{part}_normed", swap_heads, swap_heads)
        self.tap_attention(i, start)
        self.on_input(f.module("o", i), f"{start}heads")
        self.on_output(f.module("o", i), f"{start}attn_out")
        self.tap_rest(i, start)

    def cut(self, start: str, output: Tensor) -> Tensor | None:
        """q, k and v out of their fused product, and back into it."""
        seen = [self.f.split_heads(part) for part in self.f.split_qkv(output)]
        new = [self.note(start + part, value) for part, value in zip("qkv", seen, strict=True)]
        if all(a is b for a, b in zip(seen, new, strict=True)):
            return None
        if "q_norm" in self.f.parts:  # of each head in turn
            return torch.stack([swap_heads(part) for part in new], 3).flatten(2)
        return torch.cat([self.f.merge_heads(part) for part in new], -1)

    def tap_attention(self, i: int, start: str) -> None:
        attention = self.model.get_submodule(self.f.module("o", i).rpartition(".")[0])
        own, before = attention.attend, vars(attention).get("attend")  # none of its own: the class's
        vars(attention)["attend"] = lambda *args, **kwargs: self.attend(start, own, *args, **kwargs)

        def restore() -> None:
            vars(attention).pop("attend")
            vars(attention).update({"attend": before} if before else {})

        self.undo.callback(restore)

    def attend(
        self,
        start: str,
        own: Callable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        dropout: float = 0.0,
        need_weights: bool = False,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`own`, and what it does inside; by the formula where scores or weights are replaced."""
        others = () if head_mask is None else (head_mask,)  # only GPT-1's and GPT-Neo's know one
        T = q.shape[2]
        if self.f.R:
            q, new = self.note(f"{start}q_rotated", q), k[:, :, -T:]
            if (other := self.note(f"{start}k_rotated", new)) is not new:
                k = torch.cat([k[:, :, :-T], other], 2)
        if not self.with_scores:
            return own(q, k, v, attn_mask, scale, dropout, need_weights, *others)
        scores, hidden, added = self.scores(q, k, attn_mask, scale)
        seen = scores.masked_fill(hidden, torch.nan)
        given = self.note(f"{start}scores", seen)
        scores = scores if given is seen else given.to(scores.dtype)
        weights = (scores.masked_fill(hidden, -math.inf) + added).softmax(-1)
        weights = weights if head_mask is None else weights * head_mask.view(-1, 1, 1)
        rounded = weights.to(q.dtype)
        used = self.note(f"{start}weights", rounded)
        if given is seen and used is rounded:
            return own(q, k, v, attn_mask, scale, dropout, need_weights, *others)
        used = weights if used is rounded else used.to(weights.dtype)
        return (used @ upcast(self.f.repeat_kv(v))).to(q.dtype), used.to(q.dtype)

    def scores(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, T, S) scores; which of them the mask hides; and what it adds to the others."""
        T, S = q.shape[2], k.shape[2]
        scores = upcast(q) @ upcast(self.f.repeat_kv(k)).transpose(2, 3) * scale
        if attn_mask is None:
            causal = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
            return scores, ~causal, scores.new_zeros(())
        added = attn_mask.to(scores.dtype)
        return scores, added <= torch.finfo(attn_mask.dtype).min, added  # the lowest number stands for -inf

    def tap_rest(self, i: int, start: str) -> None:
        f, kept = self.f, {}
        if f.family == "openai-gpt":
            self.on_input(f.module("norm_1", i), f"{start}attn_sum")
        elif f.family != "phi":  # the sum goes on beside the norm and the MLP

            def change(x: Tensor) -> Tensor:
                new = self.note(f"{start}attn_sum", x)
                kept.update(sum=None if new is x else new)
                return new

            self.on_input(f.module("norm_2", i), None, change)
        self.on_input(f.module("up", i), f"{start}mlp_in")
        self.on_output(f.module("up", i), f"{start}mlp_up")
        self.on_input(f.module("down", i), f"{start}mlp_act")

        def mlp(output: Tensor) -> Tensor:
            kept.update(mlp=self.note(f"{start}mlp_out", output))
            return kept["mlp"]

        def out(output: tuple) -> tuple | None:
            x = output[0] if kept.get("sum") is None else kept["sum"] + kept["mlp"]
            new = self.note(f"{start}out", x)
            return None if new is output[0] else (new, *output[1:])

        self.on_output(f.module("down", i), change=mlp)
        self.on_output(f"{f.parts['layers']}.{i}", change=out)


def swap_heads(x: Tensor) -> Tensor:
    """(B, T, n, D) <-> (B, n, T, D)"""
    return x.transpose(1, 2)
