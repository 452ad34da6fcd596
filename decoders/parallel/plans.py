"""How each family is cut over processes: which matrix along which dimension, and what of it a process has."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

PLANS = {  # family -> last names of a module -> how it is cut, and into what (see `sizes`)
    "gpt_neo": {
        "wte": "vocabulary", "lm_head": "vocabulary", "attention.q_proj": "columns q",
        "attention.k_proj": "columns k", "attention.v_proj": "columns k", "attention.out_proj": "rows q",
        "mlp.c_fc": "columns mlp", "mlp.c_proj": "rows mlp",
    },
    "openai-gpt": {
        "tokens_embed": "vocabulary", "lm_head": "vocabulary", "attn.c_attn": "columns q k k",
        "attn.c_proj": "rows q", "mlp.c_fc": "columns mlp", "mlp.c_proj": "rows mlp",
    },
    "phi": {
        "embed_tokens": "vocabulary", "lm_head": "vocabulary", "self_attn.q_proj": "columns q",
        "self_attn.k_proj": "columns k", "self_attn.v_proj": "columns k", "self_attn.dense": "rows q",
        "self_attn.q_layernorm": "heads", "self_attn.k_layernorm": "heads",
        "mlp.fc1": "columns mlp", "mlp.fc2": "rows mlp",
    },
    "phi3": {
        "embed_tokens": "vocabulary", "lm_head": "vocabulary", "self_attn.qkv_proj": "columns q k k",
        "self_attn.o_proj": "rows q", "mlp.gate_up_proj": "columns mlp mlp", "mlp.down_proj": "rows mlp",
    },
    "persimmon": {
        "embed_tokens": "vocabulary", "lm_head": "vocabulary",
        "self_attn.query_key_value": "columns qkv", "self_attn.dense": "rows q",
        "self_attn.q_layernorm": "heads", "self_attn.k_layernorm": "heads",
        "mlp.dense_h_to_4h": "columns mlp", "mlp.dense_4h_to_h": "rows mlp",
    },
}  # fmt: skip
PLANS["fuyu"] = PLANS["persimmon"]


# ---- What a process has ------------------------------------------------------------------------------------


def sizes(config: Any) -> dict[str, tuple[int, int]]:
    """Part of a matrix -> (how many units that stay whole, the rows of one)."""
    config = getattr(config, "text_config", None) or config

    def get(*names: str) -> Any:
        return next((v for name in names if (v := getattr(config, name, None)) is not None), None)

    C, H = get("hidden_size", "n_embd"), get("num_attention_heads", "num_heads", "n_head")
    D, K = get("head_dim") or C // H, get("num_key_value_heads") or H
    return {"q": (H, D), "k": (K, D), "qkv": (H, 3 * D), "mlp": (get("intermediate_size") or 4 * C, 1)}


class Part(NamedTuple):
    """A part of a matrix: `count` units of `size` rows."""

    name: str
    count: int
    size: int

    def of(self, rank: int, n: int) -> tuple[int, int]:
        """(first row, rows) of one of n processes. Where there are fewer key heads, several have the same."""
        if self.count % n == 0:
            return rank * self.count // n * self.size, self.count // n * self.size
        if self.name == "k" and n % self.count == 0:
            return rank * self.count // n * self.size, self.size
        named = {"mlp": "inner widths of the MLP", "k": "heads of keys"}.get(self.name, "heads")
        raise ValueError(f"{n} processes cannot share {self.count} {named}: take a number that divides it")


class Cut(NamedTuple):
    """How a parameter is cut: along `dim`, each part for itself; by the vocabulary in plain pieces."""

    dim: int
    parts: tuple[Part, ...] = ()

    def own(self, t: Tensor, rank: int, n: int) -> Tensor:
        if not self.parts:
            step = -(-t.shape[self.dim] // n)
            start = min(rank * step, t.shape[self.dim])
            return t.narrow(self.dim, start, min(step, t.shape[self.dim] - start))
        pieces, start = [], 0
        for part in self.parts:
            first, length = part.of(rank, n)
            pieces.append(t.narrow(self.dim, start + first, length))
            start += part.count * part.size
        return torch.cat(pieces, self.dim)

    def joined(self, pieces: list[Tensor]) -> Tensor:
        """All processes' own -> the whole, for what has parts."""
        n, found, start = len(pieces), [], 0
        for part in self.parts:
            length = part.of(0, n)[1]
            firsts = {part.of(rank, n)[0]: piece for rank, piece in reversed(list(enumerate(pieces)))}
            found += [firsts[first].narrow(self.dim, start, length) for first in sorted(firsts)]
            start += length
        return torch.cat(found, self.dim)
