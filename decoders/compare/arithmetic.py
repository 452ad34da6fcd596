"""How a formula is computed: the order of its sums, where it is rounded, and the activations."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Arithmetic:
    """How to compute what exact numbers would not show. `seed` changes the order of all sums. In half
    precision `stepwise` rounds after each step of an activation, and the scores, as the plain way to write
    them down does; else these are rounded once, as fused kernels do."""

    def __init__(self, seed: int | None = None, stepwise: bool = False):
        self.seed, self.stepwise = seed, stepwise

    def order(self, n: int, device: Any) -> Tensor | slice:
        """In which order to add n numbers."""
        if self.seed is None:
            return slice(None)
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed + n)).to(device)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        order = self.order(x.shape[-1], x.device)
        return F.linear(x[..., order], weight[:, order], bias)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        order = self.order(a.shape[-1], a.device)
        return a[..., order] @ b[..., order, :]

    def mean(self, x: Tensor) -> Tensor:
        return x[..., self.order(x.shape[-1], x.device)].mean(-1, keepdim=True)

    def once(self, function: Callable, x: Tensor) -> Tensor:
        """`function` of x, rounded once or after every step."""
        return function(x) if self.stepwise else function(upcast(x)).to(x.dtype)


def upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def gelu_erf(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def relu2(x: Tensor) -> Tensor:
    return torch.relu(x) * torch.relu(x)


ACTIVATIONS = {
    "gelu_new": gelu_tanh, "gelu_fast": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "gelu": gelu_erf,
    "silu": silu, "swish": silu, "relu2": relu2, "relu": torch.relu, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "mish": F.mish, "relu6": F.relu6, "leaky_relu": F.leaky_relu,
}  # fmt: skip
