"""Sequences that grow, and the KV cache of them: what every way to decode stands on.

Letters: B sequences, T tokens of the prompt, n tokens so far, S cached positions, C hidden size, V
vocabulary.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from decoders import kernels

STEP = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"}


def lm_head_of(model: Any) -> Any:
    """The matrix that gives logits, of a model in this package."""
    return next(module.lm_head for module in model.modules() if hasattr(module, "lm_head"))


def embedding_of(model: Any) -> Any:
    """The token embedding, which comes first in each model."""
    return next(module for module in model.modules() if isinstance(module, nn.Embedding))


def last_hidden_states(output: Any) -> Tensor | None:
    return None if output.hidden_states is None else output.hidden_states[-1]


def joined(parts: list[tuple[int, Tensor | None]], output: Any, end: int) -> Any:
    """`output` of the last chunk of a prompt, up to `end`, with the last layer's hidden states of all chunks:
    `parts` are (end, states) of those before. Where frequencies change, a chunk reads earlier ones anew."""
    if not parts or output.hidden_states is None:
        return output
    states = output.hidden_states[-1]
    for part_end, part in reversed(parts):
        assert part is not None
        start, part_start = end - states.shape[1], part_end - part.shape[1]
        if part_start < start:
            states = torch.cat([part[:, : start - part_start], states], 1)
    return output._replace(hidden_states=(states,))


def text_config_of(model: Any) -> Any:
    """The config of the decoder: Fuyu's is inside."""
    return getattr(model.config, "text_config", model.config)


def rope_varies(model: Any) -> bool:
    """Whether the rotary frequencies depend on the length of the sequence (longrope, dynamic NTK scaling)."""
    return bool(getattr(text_config_of(model), "rope_varies", False))


class Sequences:
    """Ids (B, n), their attention mask, and the KV cache of all but the newest.

    Memory for `max_new_tokens` ids is there from the beginning: no step copies the past. `inputs_embeds`
    (B, T, C) are read in place of the prompt's ids, which may be those of its last tokens, or (B, 0).
    `inputs` are other arguments of `forward`; of them `position_ids` (B, T) go on by ones. `chunk`: a prompt
    is read so many tokens at a time.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor | None,
        inputs: dict,
        max_new_tokens: int,
        *,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        chunk: int | None = None,
        compiled: bool = False,
    ):
        self.model, self.cache, self.inputs, self.chunk = model, cache, dict(inputs), chunk
        self.check_chunks(inputs_embeds)
        self.decoder: Any = kernels.compile(model).decoder if compiled else None
        self.rows, self.embeds = len(ids), inputs_embeds
        self.offset = 0  # positions in front that have no ids of their own
        if inputs_embeds is not None:
            self.offset = inputs_embeds.shape[1] - ids.shape[1]
            ids = F.pad(ids, (self.offset, 0))
        self.position_ids = self.inputs.pop("position_ids", None)
        if self.position_ids is not None:
            self.position_ids = self.all_positions(ids.shape, max_new_tokens)
            mask = torch.ones_like(ids) if mask is None else mask  # without one, jumps begin packed documents
        self.length = self.prompt_length = ids.shape[1]  # positions so far, with those in front
        self.buffer = F.pad(ids, (0, max_new_tokens))
        self.mask_buffer = None if mask is None else F.pad(mask, (0, max_new_tokens), value=1)
        self.active: Tensor | None = None  # rows that the model still reads, None: all

    def check_chunks(self, inputs_embeds: Tensor | None) -> None:
        others = sorted(self.inputs.keys() - {"use_cache"})
        if self.chunk and (others or inputs_embeds is not None):
            names = ", ".join(others) or "inputs_embeds"
            raise ValueError(f"prefill_chunk_size reads ids and nothing beside them: not with {names}")

    def all_positions(self, shape: torch.Size, max_new_tokens: int) -> Tensor:
        """(B, T + new) from `position_ids` (B, T) or (1, T)."""
        given = self.position_ids
        whole = isinstance(given, Tensor) and not given.is_floating_point()
        if not whole or given.shape not in (shape, (1, shape[1])):
            wrong = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"position_ids must be a tensor {tuple(shape)} of whole numbers, not {wrong}")
        new = torch.arange(1, max_new_tokens + 1, device=given.device)
        return torch.cat([given, given[:, -1:] + new], 1).expand(shape[0], -1)

    @property
    def ids(self) -> Tensor:
        """(B, n): the prompt and what has come since."""
        return self.buffer[: self.rows, self.offset : self.length]

    @property
    def mask(self) -> Tensor | None:
        """(B, positions so far), 0 at padding; None: there is none."""
        return None if self.mask_buffer is None else self.mask_buffer[: self.rows, : self.length]

    # ---- Reading ----

    def forward(self, keep: int = 1, **wanted: bool) -> Any:
        """What the model says of the ids that are not cached yet; logits of the last `keep` of them. After an
        interrupt the cache holds what it held before."""
        past = len(self.cache or ())
        try:
            chunk = self.chunk or self.length
            ends = range(past + chunk, self.length - keep + 1, chunk)
            parts = [(end, last_hidden_states(self.read(end, 1, **wanted))) for end in ends]
            return joined(parts, self.read(self.length, keep, **wanted), self.length)
        except BaseException:
            if self.cache is not None:
                self.cache.truncate(past)
            raise

    def read(self, end: int, keep: int, **wanted: bool) -> Any:
        """One pass over the first `end` positions that are not cached yet."""
        rows = slice(None) if self.active is None else self.active
        mask = None if self.mask_buffer is None else self.mask_buffer[rows, :end]
        inputs = self.model.prepare_inputs(self.buffer[rows, :end], mask, self.cache, **self.inputs)
        past = len(inputs["past_key_values"] or ())
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids[rows, past:end]
        if self.embeds is not None and past < self.prompt_length:
            inputs |= {"input_ids": None, "inputs_embeds": self.embedded(rows, past, end)}
        others = {*wanted, *inputs} - STEP
        one = self.length - past == 1 and inputs["input_ids"] is not None
        if self.decoder and past and one and not others:
            output = self.decoder(inputs, self.buffer.shape[1] - 1)
        else:
            output = self.model(**inputs, logits_to_keep=keep, **wanted)
        self.cache = output.past_key_values
        return output

    def embedded(self, rows: Any, past: int, end: int) -> Tensor:
        """(rows, end - past, C): the prompt's embeddings, and those of the ids that have come since."""
        assert self.embeds is not None
        new = self.buffer[rows, self.prompt_length : end]
        return torch.cat([self.embeds[rows, past:end], embedding_of(self.model)(new)], 1)

    def all_logits(self, output: Any) -> Tensor:
        """Logits of the newest ids in float32, of all rows: zeros of those that are read no more."""
        logits = output.logits[:, -1].float()
        if self.active is None:
            return logits
        everywhere = logits.new_zeros(len(self.buffer), logits.shape[-1])
        everywhere[self.active] = logits
        return everywhere

    def logits(self, output: Any) -> Tensor:
        """(B, V) in float32, of the newest ids."""
        return self.all_logits(output)[: self.rows]

    def guide(self, output: Any, logits: Tensor) -> Tensor:
        """What is processed and chosen from: the logits themselves, where nothing guides."""
        return logits

    # ---- Growing ----

    def append(self, new: Tensor) -> None:
        """(B,) or (B, k) ids."""
        new = new.view(len(self.buffer), -1)
        self.buffer[:, self.length : self.length + new.shape[1]] = new
        self.length += new.shape[1]

    def truncate(self, n: int) -> None:
        """Forget all but the first n of `ids`; at most the newest is then not cached."""
        self.length = self.offset + n
        if self.cache is not None:
            self.cache.truncate(self.length - 1)

    def expand(self, times: int) -> None:
        """Each row as many times, one copy below the other."""
        if times == 1:
            return
        index = torch.arange(len(self.buffer), device=self.buffer.device).repeat_interleave(times)
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and name != "head_mask" and len(value) == self.rows:
                self.inputs[name] = value.repeat_interleave(times, 0)
            elif isinstance(value, list) and len(value) == self.rows:
                self.inputs[name] = [row for row in value for _ in range(times)]
        self.buffer, self.rows = self.buffer[index], self.rows * times
        self.mask_buffer = None if self.mask_buffer is None else self.mask_buffer[index]
        self.embeds = None if self.embeds is None else self.embeds[index]
        self.position_ids = None if self.position_ids is None else self.position_ids[index]
        if self.cache is not None:
            self.cache.reorder(index)

    def drop_finished(self, unfinished: Tensor) -> None:
        """Rows that are finished are read no more, once they are a quarter of those that are: others move in
        the cache, which costs about what a few steps with them would. `unfinished`: (B,) booleans."""
        active = unfinished.nonzero()[:, 0]
        previous = self.active
        if previous is None:
            previous = torch.arange(len(unfinished), device=active.device)
        if 0 < len(active) <= 0.75 * len(previous):
            self.active = active
            if self.cache is not None:
                self.cache.reorder(unfinished[previous].nonzero()[:, 0])

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was, which has the same prompt: only what has come since moves,
        and only of rows that do."""
        moved = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        if not len(moved):
            return
        source, new = index[moved], slice(self.prompt_length, None)
        self.buffer[moved, new] = self.buffer[source, new]
        for k, v in self.cache or ():
            k[moved, :, new], v[moved, :, new] = k[source, :, new], v[source, :, new]
