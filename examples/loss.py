"""The loss of a training without the logits of the whole batch: a gigabyte for 5,000 tokens of GPT-Neo's."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**26  # logits that exist at a time: of 1,335 positions of GPT-Neo, of 256 of Persimmon


class Loss(nn.Module):
    """Mean cross entropy of the next tokens by a language model of ours, with its gradient."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.head = next(m for name, m in model.named_modules() if name.endswith("lm_head"))

    def forward(self, ids: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
        """ids and labels (B, T), labels -100 where nothing is learnt; `inputs` are the model's others."""
        output = self.model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1, **inputs)
        x, labels = output.hidden_states[-1][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = ChunkedCrossEntropy.apply(
            x, self.head.weight, self.head.bias, labels, torch.is_grad_enabled()
        )
        return total / (labels != -100).sum().clamp(min=1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum over N positions of -log softmax(x W^T + b)[label]. Its gradient by the logits is the softmax,
    less 1 at the label; so that it is known as soon as the logits are, and CHUNK of them are kept at a time.

    x (N, C), weight (V, C), bias (V,) or None, labels (N,). `with_grad`: whether anybody asks for a gradient,
    which is not known in `forward`, where gradients are off.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, with_grad: bool
    ) -> Tensor:
        needs_x, needs_weight, needs_bias = (with_grad and needed for needed in ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        grads: list[Tensor | None] = [None, None, None]
        if needs_x:
            grads[0] = torch.empty_like(x)
        dtype = product_dtype(x)
        x, w = x.to(dtype), weight.to(dtype)  # once, not in each chunk
        size = max(1, CHUNK // len(weight))
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            loss, softmax = loss_and_gradient(F.linear(x[rows], w, bias), labels[rows])
            total += loss
            if grads[0] is not None:
                grads[0][rows] = softmax @ w
            if needs_weight:
                grads[1] = added(grads[1], softmax.t() @ x[rows], weight.dtype)
            if needs_bias:
                grads[2] = added(grads[2], softmax.sum(0), bias.dtype)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """In place, to save memory: so once only, which autograd checks."""
        return *(None if one is None else one.mul_(grad) for one in ctx.saved_tensors), None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """What products are computed in: autocast's dtype, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and its gradient by the logits (N, V), in the dtype of the logits."""
    real = labels != -100
    index = labels.masked_fill(~real, 0)[:, None]  # any other label below 0 is an error of gather
    log_softmax = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    loss = -log_softmax.gather(1, index)[:, 0].masked_fill(~real, 0).sum()
    gradient = log_softmax.exp_()
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
    gradient[~real] = 0
    return loss, gradient.to(logits.dtype)


def added(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.to(dtype) if total is None else total.add_(part)
