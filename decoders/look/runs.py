"""A run is traced: the whole text, or the last tokens of a long one."""

from typing import Any

import torch

from .content import Run, shown_of
from .html import MOST
from .traces import Trace, trace


def data(run: Run) -> tuple[dict[str, Any], Trace]:
    """What the page shows of a run, as JSON has it, and its trace."""
    found, start = traced(run)
    return shown_of(run, found, start), found


@torch.no_grad()
def traced(run: Run) -> tuple[Trace, int]:
    """The trace of what is shown, and how many tokens stand before it. ValueError for too many tokens."""
    ids = torch.as_tensor(run.ids).reshape(1, -1).to(next(run.model.parameters()).device)
    T = ids.shape[1]
    if T == 0:
        raise ValueError("the prompt is empty: there is no token to look at")
    start = T - check_length(T, run.last)
    if not start:
        return trace(run.model, ids, **run.inputs), 0
    if run.inputs:  # a picture, a mask: they belong to the whole text
        raise ValueError(f"--last cannot cut a text with {', '.join(run.inputs)}")
    past = None
    for part in ids[:, :start].split(256, 1):  # bounded memory
        past = run.model(
            input_ids=part, past_key_values=past, use_cache=True, logits_to_keep=1
        ).past_key_values
    return trace(run.model, ids[:, start:], past_key_values=past), start


def check_length(T: int, last: int | None) -> int:
    """How many of T tokens are shown. ValueError for more than a page holds."""
    if last is None and T > MOST:
        raise ValueError(
            f"{T:,} tokens, with those to come, are more than the {MOST} of a page: with "
            "--last 256 all are read, and the last 256 are shown"
        )
    if last is not None and not 1 <= last <= MOST:
        raise ValueError(f"--last must be from 1 to {MOST}, not {last}")
    return T if last is None else min(last, T)
