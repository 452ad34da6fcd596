"""Classifier-free guidance (CFG): away from what the model says after a negative prompt.

Sanchez et al. (2023), arXiv:2306.17806: log p = log p(negative) + scale * (log p - log p(negative)).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequences import Sequences, rope_varies


class GuidedSequences(Sequences):
    """Sequences of which each has a second one, after a negative prompt, that gets the same new ids.

    `negative` are (ids, mask) of as many rows, `negative_embeds` (B, 1, C) stand in for ids. One pass reads
    both where they may share one. Where the rotary frequencies follow from the longest sequence of a batch,
    or the prompt has inputs of its own beside ids, or somebody looks at what a pass records (`separate`),
    each has a pass and a cache for itself.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor | None,
        inputs: dict,
        max_new_tokens: int,
        *,
        negative: tuple[Tensor, Tensor],
        scale: float,
        separate: bool = False,
        negative_embeds: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        chunk: int | None = None,
        compiled: bool = False,
    ):
        own = {"cache": cache, "inputs_embeds": inputs_embeds, "chunk": chunk, "compiled": compiled}
        given = inputs.keys() - {"use_cache"} or inputs_embeds is not None or cache is not None
        self.scale = scale
        self.negative: Sequences | None = None
        self.negative_logits: Tensor | None = None
        if separate or given or rope_varies(model):
            super().__init__(model, ids, mask, inputs, max_new_tokens, **own)
            plain = {name: inputs[name] for name in ("use_cache",) if name in inputs}
            negative_mask = None if negative[1].all() else negative[1]
            self.negative = Sequences(
                model,
                negative[0],
                negative_mask,
                plain,
                max_new_tokens,
                inputs_embeds=negative_embeds,
                chunk=chunk,
                compiled=compiled,
            )
            return
        both, both_mask = padded_together(ids, mask, *negative)
        super().__init__(model, both, both_mask, inputs, max_new_tokens, **own)
        self.rows, self.offset = len(ids), both.shape[1] - ids.shape[1]

    def doubled(self, rows: Tensor, step: int = 0) -> Tensor:
        """`rows` of the prompts, and with one pass those of the negative prompts `step` below."""
        return rows if self.negative else torch.cat([rows, rows + step])

    def forward(self, keep: int = 1, **wanted: bool) -> Any:
        output = super().forward(keep, **wanted)
        if self.negative:
            self.negative_logits = self.negative.logits(self.negative.forward())
        return output

    def guide(self, output: Any, logits: Tensor) -> Tensor:
        """Log-probabilities (B, V), led away from those after the negative prompt."""
        negative = self.negative_logits if self.negative else self.all_logits(output)[self.rows :]
        assert negative is not None
        away = negative.log_softmax(-1)
        return away + self.scale * (logits.log_softmax(-1) - away)

    def append(self, new: Tensor) -> None:
        super().append(self.doubled(new.view(self.rows, -1)))
        if self.negative:
            self.negative.append(new)

    def expand(self, times: int) -> None:
        super().expand(times)
        if self.negative:
            self.negative.expand(times)

    def drop_finished(self, unfinished: Tensor) -> None:
        super().drop_finished(self.doubled(unfinished))
        if self.negative:
            self.negative.drop_finished(unfinished)

    def reorder(self, index: Tensor) -> None:
        super().reorder(self.doubled(index, self.rows))
        if self.negative:
            self.negative.reorder(index)


def padded_together(
    ids: Tensor, mask: Tensor | None, negative_ids: Tensor, negative_mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One batch of both, the shorter ones padded on the left, and its mask; None: there is no padding."""
    length = max(ids.shape[1], negative_ids.shape[1])

    def padded(rows: Tensor) -> Tensor:
        return F.pad(rows, (length - rows.shape[1], 0))

    mask = torch.ones_like(ids) if mask is None else mask
    both_mask = torch.cat([padded(mask), padded(negative_mask)])
    return torch.cat([padded(ids), padded(negative_ids)]), None if both_mask.all() else both_mask
