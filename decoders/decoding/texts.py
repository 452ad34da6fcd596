"""Texts that grow, row by row, with the model's cache of them: what every way to decode stands on."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders import kernels

STEP = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"}


def head_of(model: nn.Module) -> nn.Module:
    """The matrix that gives logits, of a model in this package."""
    return next(part.lm_head for part in model.modules() if hasattr(part, "lm_head"))


class Text:
    """Rows of ids, their mask, and the cache of all but the newest: memory for `room` new ids is there from
    the beginning, no step copies the past. Rows may leave: then the model reads the others only.

    `embeds` (rows, T, C) stand before the ids, for a prompt without tokens. With `against`, a (ids, mask) of
    as many rows, each row has a second one that gets the same new ids, in the same pass: `logits` leads away
    from what that would say, by `scale` (Sanchez et al., 2023, arXiv:2306.17806).
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor | None,
        cache: Any,
        inputs: dict,
        room: int,
        embeds: Tensor | None = None,
        against: tuple[Tensor, Tensor] | None = None,
        scale: float = 1.0,
        chunk: int | None = None,
        compiled: bool = False,
    ):
        if chunk and (embeds is not None or inputs.keys() - {"use_cache"}):
            told = ", ".join(sorted(inputs.keys() - {"use_cache"})) or "inputs_embeds"
            raise ValueError(f"prefill_chunk_size reads ids and nothing beside them: not with {told}")
        self.model, self.cache, self.inputs, self.scale = model, cache, dict(inputs), scale
        self.chunk, self.live = chunk, None  # the rows that the model reads, None: all
        self.decoder = kernels.compile(model).decoder if compiled else None
        self.rows, self.embeds, self.skipped = len(ids), embeds, 0
        if embeds is not None:  # ids of zero stand for them, and are never shown
            ids, self.skipped = ids.new_zeros(embeds.shape[:2]), embeds.shape[1]
        self.guided = against is not None
        if self.guided:
            T = ids.shape[1]
            mask = torch.ones_like(ids) if mask is None else mask
            pairs = [padded_left(rows, max(T, against[0].shape[1])) for rows in (ids, mask, *against)]
            ids, mask = torch.cat([pairs[0], pairs[2]]), torch.cat([pairs[1], pairs[3]])
            self.skipped, mask = ids.shape[1] - T, None if mask.all() else mask
        self.n = self.start = ids.shape[1]
        self.buffer = torch.cat([ids, ids.new_zeros(len(ids), room)], 1)
        self.masks = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), room)], 1)

    @property
    def ids(self) -> Tensor:
        """(rows, n): the prompt and what has come since."""
        return self.buffer[: self.rows, self.skipped : self.n]

    @property
    def mask(self) -> Tensor | None:
        return None if self.masks is None else self.masks[:, : self.n]

    def forward(self, keep: int = 1, **wanted) -> Any:
        """What the model says of the ids that are not cached yet; logits of the last `keep` of them. After an
        interrupt the cache holds what it held before."""
        past = len(self.cache or ())
        try:
            if self.chunk:
                for end in range(past + self.chunk, self.n - keep + 1, self.chunk):
                    self.read(end, 1)
            return self.read(self.n, keep, **wanted)
        except BaseException:
            if self.cache is not None:
                self.cache.truncate(past)
            raise

    def read(self, end: int, keep: int, **wanted) -> Any:
        """One pass over the first `end` ids that are not cached yet."""
        rows = slice(None) if self.live is None else self.live
        mask = None if self.masks is None else self.masks[rows, :end]
        inputs = self.model.prepare_inputs(self.buffer[rows, :end], mask, self.cache, **self.inputs)
        if self.embeds is not None and not len(inputs["past_key_values"] or ()):
            if self.n > self.start:
                raise ValueError("the text must be read anew, and inputs_embeds have no ids: give input_ids")
            inputs |= {"input_ids": None, "inputs_embeds": self.embeds}
        others = {*wanted, *inputs} - STEP
        one = len(inputs["past_key_values"] or ()) and inputs["input_ids"].shape[1] == 1
        if self.decoder and one and not others:
            output = self.decoder(inputs, self.buffer.shape[1] - 1)
        else:
            output = self.model(**inputs, logits_to_keep=keep, **wanted)
        self.cache = output.past_key_values
        return output

    def logits(self, output: Any) -> Tensor:
        """(rows, V) in float32, of the newest ids; zeros of rows that have left."""
        return self.of_all(output.logits[: len(output.logits) // (1 + self.guided), -1].float())

    def of_all(self, logits: Tensor) -> Tensor:
        if self.live is None:
            return logits
        everywhere = logits.new_zeros(self.rows, logits.shape[-1])
        everywhere[self.live[: len(logits)]] = logits
        return everywhere

    def led(self, output: Any, logits: Tensor) -> Tensor:
        """The same led away from what the second rows say, as logarithms."""
        if not self.guided:
            return logits
        other = self.of_all(output.logits[len(output.logits) // 2 :, -1].float()).log_softmax(-1)
        return other + self.scale * (logits.log_softmax(-1) - other)

    def append(self, new: Tensor) -> None:
        """(rows,) or (rows, k) ids."""
        new = new.view(self.rows, -1)
        self.buffer[:, self.n : self.n + new.shape[1]] = torch.cat([new, new]) if self.guided else new
        self.n += new.shape[1]

    def truncate(self, n: int) -> None:
        """Forget all but the first n of `ids`; at most the newest is then not cached."""
        self.n = self.skipped + n
        if self.cache is not None:
            self.cache.truncate(self.n - 1)

    def expand(self, times: int) -> None:
        """Each row as many times, one copy below the other."""
        if times == 1:
            return
        index = torch.arange(len(self.buffer), device=self.buffer.device).repeat_interleave(times)
        for key, value in self.inputs.items():
            if isinstance(value, Tensor) and key != "head_mask" and len(value) == self.rows:
                self.inputs[key] = value.repeat_interleave(times, 0)
            elif isinstance(value, list) and len(value) == self.rows:
                self.inputs[key] = [row for row in value for _ in range(times)]
        self.buffer, self.rows = self.buffer[index], self.rows * times
        self.masks = None if self.masks is None else self.masks[index]
        self.embeds = None if self.embeds is None else self.embeds[index]
        if self.cache is not None:
            self.cache.reorder(index)

    def leave(self, running: Tensor) -> None:
        """Rows that do not run (rows,) are read no more, once they are a quarter of those that are: others
        move in the cache, which costs about what a few steps with them would."""
        running = torch.cat([running, running]) if self.guided else running
        live = running.nonzero()[:, 0]
        before = torch.arange(len(running), device=live.device) if self.live is None else self.live
        if 0 < len(live) <= 0.75 * len(before):
            self.live = live
            if self.cache is not None:
                self.cache.reorder(running[before].nonzero()[:, 0])

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was, which has the same prompt: only what has come since moves,
        and only of rows that do."""
        index = torch.cat([index, index + self.rows]) if self.guided else index
        moved = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        if not len(moved):
            return
        source, new = index[moved], slice(self.start, None)
        self.buffer[moved, new] = self.buffer[source, new]
        for k, v in self.cache or ():
            k[moved, :, new], v[moved, :, new] = k[source, :, new], v[source, :, new]


def padded_left(rows: Tensor, length: int) -> Tensor:
    return torch.cat([rows.new_zeros(len(rows), length - rows.shape[1]), rows], 1)
