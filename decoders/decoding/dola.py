"""DoLa: what the last layer says more than an early one. Chuang et al. (2023), arXiv:2309.03883."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .sequences import lm_head_of, text_config_of


class DoLa:
    """Of `layers` that which differs most from the last one is taken away from it. Early states go into the
    output layer without the final norm, as in Transformers 4.50."""

    def __init__(self, model: nn.Module, layers: str | Sequence[int]):
        self.layers, self.lm_head = early_layers(text_config_of(model), layers), lm_head_of(model)

    def __call__(self, output: Any, logits: Tensor) -> Tensor:
        states = [output.hidden_states[layer][:, -1] for layer in self.layers]
        early = torch.stack([self.lm_head(state).float() for state in states]).log_softmax(
            -1
        )  # (layers, B, V)
        last = logits.log_softmax(-1)  # (B, V)
        chosen = divergence(last, early).argmax(0)  # (B,)
        base = early[chosen, torch.arange(len(logits), device=logits.device)]
        implausible = last < last.amax(-1, keepdim=True) + math.log(0.1)
        return (last - base).masked_fill(implausible, -math.inf)


def divergence(last: Tensor, early: Tensor) -> Tensor:
    """(layers, B) twice the Jensen-Shannon divergence of each of `early` from `last`, over V."""
    mixture = 0.5 * (last.exp() + early.exp())
    of_last = F.kl_div(last.expand_as(mixture), mixture, reduction="none").mean(-1)
    return of_last + F.kl_div(early, mixture, reduction="none").mean(-1)


def early_layers(config: Any, layers: str | Sequence[int]) -> list[int]:
    """The candidates for the early layer. ValueError for none."""
    names = ("num_hidden_layers", "num_layers", "n_layer")
    n = next(getattr(config, name) for name in names if hasattr(config, name))
    first = 0
    if config.tie_word_embeddings:  # the embeddings, layer 0, would say the token itself
        first = {1: 0, 2: 1}.get(n, 2)
    if layers == "low":
        found = list(range(first, n // 2 if n <= 40 else 20, 2)) or [first]
    elif layers == "high":
        found = list(range(n // 2 if n <= 40 else n - 20, n, 2))
    else:
        found = [layer for layer in layers if isinstance(layer, int) and 0 <= layer < n]
    if not found:
        raise ValueError(f"dola_layers must be 'low', 'high' or layers from 0 to {n - 1}, not {layers!r}")
    return found
