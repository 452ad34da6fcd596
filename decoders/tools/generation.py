"""Ways to decode, for all models: what `generate` of a model file has, and penalties, processors, criteria.

    from decoders.tools import generation
    generation.generate(model, ids, max_new_tokens=20, repetition_penalty=1.2)

A model has to offer `forward` with a cache, `prepare_inputs` and `special_ids`. Where the loop in a
model file can do the same, both give the same ids.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids (B, T), float32 logits (B, V)) -> logits


class RepetitionPenalty:
    """Divide the logits of tokens seen before by `penalty`, multiply them where they are negative."""

    def __init__(self, penalty: float):
        if not penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, not {penalty}")
        self.penalty = penalty

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        old = logits.gather(1, ids)
        return logits.scatter(1, ids, torch.where(old < 0, old * self.penalty, old / self.penalty))


def check(model: nn.Module, T: int, max_new_tokens: int, temperature, top_k, top_p) -> None:
    """ValueError for numbers that cannot be, before anything is computed."""
    if T < 1 or max_new_tokens < 0:
        raise ValueError(f"the prompt has {T} tokens, max_new_tokens is {max_new_tokens}")
    room = model.max_positions
    if room is not None and T + max_new_tokens - 1 > room:  # the last new token is not fed
        raise ValueError(f"{T} prompt + {max_new_tokens} new tokens do not fit into {room} positions")
    if not (temperature > 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)):
        raise ValueError("temperature must be above 0, top_k must be at least 1, top_p must be above 0 "
                         f"to 1, not {temperature}, {top_k}, {top_p}")


@torch.no_grad()
def generate(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *,
             max_new_tokens: int, repetition_penalty: float | None = None,
             logits_processor: Sequence[Processor] = (),
             stopping_criteria: Sequence[Callable[[Tensor, Tensor], Any]] = (), do_sample: bool = False,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             eos_token_id: int | Sequence[int] | str | None = "checkpoint", pad_token_id: int | None = None,
             generator: torch.Generator | None = None, streamer: Any = None, past_key_values: Any = None,
             **inputs) -> Tensor:
    """(B, T + new) ids, as `model.generate`, which describes the other arguments.

    Each processor maps (ids, float32 logits) to logits, each criterion to True or (B,) booleans.
    """
    check(model, input_ids.shape[1], max_new_tokens, temperature, top_k, top_p)
    next_token = sys.modules[type(model).__module__].next_token
    penalty = None if repetition_penalty is None else RepetitionPenalty(repetition_penalty)
    ids, cache, (eos, pad) = input_ids, past_key_values, model.special_ids(eos_token_id, pad_token_id)
    mask = None if attention_mask is None or attention_mask.all() else attention_mask.long()
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    for _ in range(max_new_tokens):
        output = model(**model.prepare_inputs(ids, mask, cache, **inputs), logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        for processor in logits_processor:
            logits = processor(ids, logits)
        if penalty is not None:  # padding earns none, as in Transformers 5
            logits = penalty(ids if mask is None else ids.where(mask.bool(), ids[:, -1:]), logits)
        new = next_token(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
        new = torch.where(running, new, pad)
        ids = torch.cat([ids, new[:, None]], 1)
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        if streamer is not None:
            streamer.put(new.cpu())
        running &= ~torch.isin(new, eos.to(new.device))
        for criterion in stopping_criteria:
            running &= ~torch.as_tensor(criterion(ids, logits), device=ids.device)
        if not running.any():
            break
    if streamer is not None:
        streamer.end()
    return ids
