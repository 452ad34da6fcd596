"""A KV cache made visible, in a notebook: what it holds, and how much room it has.

look.cache(output.past_key_values)                     # one of them
%load_ext decoders.look                                # from now on every KVCache shows itself
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import torch

from .words import word

CELLS = 128  # positions that are drawn one by one
FAMILIES = ("gpt_neo", "openai_gpt", "phi", "phi3", "persimmon", "fuyu")


class CacheView:
    """What a notebook shows of a KVCache. `ids` (S,) and `tokenizer` write a token at each position."""

    def __init__(self, cache: Any, ids: Sequence[int] = (), tokenizer: Any = None):
        self.cache, self.ids, self.tokenizer = cache, list(ids), tokenizer

    @property
    def room(self) -> int:
        """Positions for which there is memory."""
        return max((k.shape[2] for k, _ in self.cache.buffers), default=0)

    @property
    def bytes(self) -> int:
        """Of all memory, also of what nothing has been written into yet."""
        return sum(part.numel() * part.element_size() for pair in self.cache.buffers for part in pair)

    def __repr__(self) -> str:
        layers, S = len(self.cache.buffers), len(self.cache)
        if not layers:
            return "KVCache: empty"
        B, K, _, D = self.cache[0][0].shape
        dtype = str(self.cache[0][0].dtype).removeprefix("torch.")
        if self.cache.buffers[0][0].dtype == torch.int8:  # what `cache[0]` gives is not what is stored
            dtype += " in 8 bits"
        return (
            f"KVCache: {S} positions of {self.room} in {layers} layers, k and v of (B, K, S, D) = "
            f"({B}, {K}, {S}, {D}) each, {dtype}, {self.bytes / 1e3:,.1f} kB"
        )

    def _repr_html_(self) -> str:
        """Layers downwards, positions to the right: darker is a longer key, empty is room. Of the first
        sequence; a long cache is one bar."""
        lines = [f"<p>{escape(repr(self))}</p>"]
        if len(self.cache) and self.room <= CELLS:
            rows = "".join(self.row(layer) for layer in range(len(self.cache.buffers)))
            lines.append(f'<table style="border-collapse: collapse">{self.header()}{rows}</table>')
        elif len(self.cache):
            lines.append(f'<progress max="{self.room}" value="{len(self.cache)}"></progress>')
        return f'<div style="overflow-x: auto">{"".join(lines)}</div>'

    def header(self) -> str:
        """Tokens, written downwards, where ids are given."""
        if not self.ids:
            return ""
        style = "writing-mode: vertical-rl; text-align: left; padding: 1px; font: 11px monospace"
        words = [word(self.tokenizer, id).replace(" ", "␣") for id in self.ids[: len(self.cache)]]
        cells = [f'<th style="{style}">{escape(each)}</th>' for each in words]
        return f"<tr><th></th>{''.join(cells)}</tr>"

    def row(self, layer: int) -> str:
        k, _ = self.cache[layer]
        lengths = k[0].detach().float().norm(dim=-1).mean(0)  # (S,) of the keys, over heads
        shares = (lengths / lengths.max().clamp(min=1e-30)).tolist()
        room = self.cache.buffers[layer][0].shape[2]
        cells = [cell(share, f"position {i}") for i, share in enumerate(shares)]
        cells += [cell(None, "room")] * (room - len(shares))
        label = f'<th style="text-align: right; padding: 1px 6px; white-space: nowrap">layer {layer}</th>'
        return f"<tr>{label}{''.join(cells)}</tr>"


def cell(share: float | None, title: str) -> str:
    """A key, darker the longer it is, or room for one."""
    colour = "transparent" if share is None else f"rgba(31, 90, 200, {0.15 + 0.85 * share:.2f})"
    style = f"background: {colour}; border: 1px solid #8888; padding: 0"
    return f'<td title="{title}" style="{style}; min-width: 13px; height: 14px"></td>'


def cache(past_key_values: Any, ids: Sequence[int] = (), tokenizer: Any = None) -> CacheView:
    """A view of a KVCache that shows itself in a notebook. `ids`: those that it holds, as a list."""
    return CacheView(past_key_values, ids, tokenizer)


def load_ipython_extension(ipython: Any) -> None:
    """What `%load_ext decoders.look` does: every KVCache of the six files shows itself."""
    formatter = ipython.display_formatter.formatters["text/html"]
    for family in FAMILIES:
        for name in ("KVCache", "LongropeCache"):
            formatter.for_type_by_name(f"decoders.{family}", name, lambda c: CacheView(c)._repr_html_())
