"""When a sequence ends, beside stop ids and lengths: functions (ids (B, n), scores) -> (B,) booleans."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Criterion = Callable[[Tensor, Any], Any]


def stop_strings_criterion(strings: str | Sequence[str], tokenizer: Any) -> Criterion:
    """Whether the newest token ends one of `strings`, or has its end inside."""
    strings = [strings] if isinstance(strings, str) else list(strings)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings must be texts that are not empty, not {strings!r}")
    tail = 4 * max(map(len, strings)) + 8  # a token has a byte at least

    def ends(ids: list[int]) -> bool:
        previous = tokenizer.decode(ids[:-1]).rstrip("\ufffd")
        text = tokenizer.decode(ids)
        return any(text.find(string, max(0, len(previous) - len(string) + 1)) >= 0 for string in strings)

    return lambda ids, scores: torch.tensor([ends(sequence) for sequence in ids[:, -tail:].tolist()])


def max_time_criterion(seconds: float) -> Criterion:
    end = time.monotonic() + seconds
    return lambda ids, scores: time.monotonic() > end


def stopped(criteria: Sequence[Criterion], ids: Tensor, scores: Any) -> Tensor:
    """(B,) booleans: whether any of `criteria` holds. ValueError for answers that are no booleans."""
    found = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for criterion in criteria:
        answer = torch.as_tensor(criterion(ids, scores), device=ids.device)
        if answer.shape not in ((), (1,), found.shape):
            raise ValueError(
                f"a stopping criterion must give True, False or ({len(ids)},) booleans, "
                f"not {tuple(answer.shape)}"
            )
        found = found | answer.bool()
    return found
