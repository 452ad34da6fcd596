"""Log-probabilities of ids that there are already: of any text, and of what `generate` has chosen."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .checks import check_prompt
from .sequences import lm_head_of


@torch.no_grad()
def score(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, rows: int = 256, **inputs: Any
) -> Tensor:
    """(B, T - 1) log-probabilities that the model gives to each token after the first, 0 where
    `attention_mask` (B, T) has padding before or at it. One pass; never more than `rows` rows of logits."""
    check_prompt(input_ids, attention_mask)
    mask = None if attention_mask is None or attention_mask.all() else attention_mask.long()
    x = last_hidden_state(model, input_ids, mask, inputs)[:, :-1].flatten(0, 1)
    targets, lm_head = input_ids[:, 1:].flatten(), lm_head_of(model)
    losses = [
        F.cross_entropy(lm_head(part).float(), target, reduction="none")
        for part, target in zip(x.split(rows), targets.split(rows), strict=True)
    ]
    scores = -torch.cat(losses) if losses else x.new_zeros(0).float()
    scores = scores.view(len(input_ids), input_ids.shape[1] - 1)
    return scores if mask is None else scores * (mask[:, 1:] * mask[:, :-1])


def last_hidden_state(model: Any, ids: Tensor, mask: Tensor | None, inputs: dict) -> Tensor:
    """(B, T, C) before the output layer."""
    states: list[Tensor] = []

    def keep(module: nn.Module, given: tuple, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            states.append(output.last_hidden_state)

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        given = model.prepare_inputs(ids, mask, None, **{"use_cache": False, **inputs})
        model(**given, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return states[-1]


def compute_transition_scores(
    sequences: Tensor,
    scores: Sequence[Tensor],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """(rows, new) score of each new token of `sequences`, from what `generate` gave with `output_scores`.
    With `beam_indices` the row it came from is followed, and 0 stands after the end of a beam."""
    steps = torch.stack(list(scores))  # (new, rows, V)
    steps = steps.log_softmax(-1) if normalize_logits else steps
    if beam_indices is None:
        n = len(steps)
        rows = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, n)
    else:
        n = int((beam_indices >= 0).sum(1).max())
        rows = beam_indices[:, :n]
    new = sequences[:, sequences.shape[1] - n :]
    found = steps[torch.arange(n, device=new.device), rows.clamp(min=0), new]
    return found.masked_fill(rows < 0, 0.0)
