"""What an activation becomes in a patched pass: replaced, or ablated."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def chained(changes: list[Change]) -> Change:
    def change(value: Tensor) -> Tensor:
        for each in changes:
            value = each(value)
        return value

    return change


def replaced(name: str, new: Any, positions: Any) -> Change:
    def change(value: Tensor) -> Tensor:
        other = new(value) if callable(new) else torch.as_tensor(new).to(value)
        try:
            other = other.expand_as(value)
        except RuntimeError:
            message = f"{tuple(value.shape)}, not {tuple(other.shape)}: take a text of the same length"
            raise ValueError(f"{name} has the shape {message}") from None
        if positions is None:
            return other.clone()
        at = (slice(None),) * (2 if value.dim() == 4 else 1) + (positions,)
        value = value.clone()
        value[at] = other[at]
        return value

    return change


def silenced(name: str, columns: slice, by: str) -> Change:
    def change(value: Tensor) -> Tensor:
        value, at = value.clone(), 2 if value.dim() == 4 else 1
        part = value[..., columns]
        value[..., columns] = part.mean(at, keepdim=True) if by == "mean" else 0
        return value

    return change
