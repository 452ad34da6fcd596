"""The loss of a training without the logits of the whole batch: a gigabyte for 5,000 tokens of GPT-Neo's."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # positions whose logits exist at a time


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
        total = ChunkedCrossEntropy.apply(x, self.head.weight, self.head.bias, labels)
        return total / (labels != -100).sum().clamp(min=1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum over N positions of -log softmax(x W^T + b)[label]. Its gradient by the logits is the softmax,
    less 1 at the label; so that it is known as soon as the logits are, and CHUNK of them are kept at a time.

    x (N, C), weight (V, C), bias (V,) or None, labels (N,).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        inputs = (x, weight, bias)
        grads = [torch.zeros_like(one) if w else None for one, w in zip(inputs, wanted, strict=True)]
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            loss, softmax = loss_and_gradient(F.linear(x[rows], weight, bias), labels[rows])
            total += loss
            if wanted[0]:
                grads[0][rows] = softmax @ weight.to(softmax.dtype)
            if wanted[1]:
                add_product(grads[1], softmax, x[rows])
            if wanted[2]:
                grads[2] += softmax.sum(0)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """In place, to save memory: so once only, which autograd checks."""
        return *(None if one is None else one.mul_(grad) for one in ctx.saved_tensors), None


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and its gradient by the logits (N, V), in the logits' dtype and memory."""
    real = labels != -100
    index = labels.clamp(min=0)[:, None]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_sum = wide.logsumexp(-1, keepdim=True)
    loss = (log_sum - wide.gather(1, index))[:, 0].masked_fill(~real, 0).sum()
    softmax = wide.sub_(log_sum).exp_()
    softmax.scatter_add_(1, index, torch.full_like(log_sum, -1.0))
    return loss, softmax.mul_(real[:, None]).to(logits.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (V, C) += a^T b, with a (N, V) and b (N, C)."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a.t(), b)
    else:  # under autocast
        total += a.t() @ b.to(a.dtype)
