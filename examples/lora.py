"""LoRA in forty lines, over any of the six models (Hu et al., 2021, arXiv:2106.09685).

add_lora(model, r=8)            # train what has a gradient
weights.save(merged(model), folder)
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class LoRA(nn.Module):
    """A frozen linear layer, plus 2 B A x of rank r. B begins at zero, so the model begins as it was."""

    def __init__(self, layer: nn.Module, r: int):
        super().__init__()
        self.layer, self.transposed = layer, type(layer) is not nn.Linear  # GPT-1's Conv1D is (in, out)
        out_features, in_features = layer.weight.T.shape if self.transposed else layer.weight.shape
        self.a = nn.Parameter(torch.randn(r, in_features) / math.sqrt(in_features))
        self.b = nn.Parameter(torch.zeros(out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * F.linear(F.linear(x, self.a), self.b)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        delta = 2 * self.b @ self.a
        self.layer.weight += delta.T if self.transposed else delta
        return self.layer


def add_lora(model: nn.Module, r: int) -> None:
    """On every matrix of the blocks, in place; all else is frozen."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        is_matrix = type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"
        if is_matrix and not name.endswith("lm_head"):
            model.set_submodule(name, LoRA(layer, r))


def merged(model: nn.Module) -> nn.Module:
    """A plain model: each B A added to its weight."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRA):
            model.set_submodule(name, layer.merged())
    return model
