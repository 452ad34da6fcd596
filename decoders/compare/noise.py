"""How far correct arithmetic of a precision may be off, measured.

The formula is computed with its sums in several orders, in half precision also with every step of an
activation rounded; the worst of these is the unit of every comparison.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .arithmetic import Arithmetic
from .formula import stages

DTYPES = ("float64", "float32", "bfloat16", "float16")  # rows of a noise
BEYOND = 4.0  # times the noise: from here on it is a difference


def compared(name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """A stage, (B, T, features) or (B, heads, T, features), with NaN for what padding computes."""
    mask = inputs.get("attention_mask")
    if mask is None or bool((mask != 0).all()) or name == "loss" or name.startswith("grad."):
        return value
    real = (mask != 0)[:, None, :, None] if value.dim() == 4 else (mask != 0)[..., None]
    return torch.where(real.expand(value.shape), value, torch.nan)


def truth(
    config: Any, weights: Mapping[str, Tensor], inputs: dict, gradients: bool = True, **options: Any
) -> dict[str, Tensor]:
    """Every stage of a case in the weights' dtype, without what nobody has to agree on."""
    found = stages(config, weights, inputs, gradients=gradients and "labels" in inputs, **options)
    return {name: compared(name, value, inputs) for name, value in found.items()}


WAYS = {
    "float64": [Arithmetic(1), Arithmetic(2)],
    "float32": [Arithmetic(), *(Arithmetic(seed) for seed in range(1, 5))],
}
WAYS["bfloat16"] = WAYS["float16"] = [
    Arithmetic(),
    Arithmetic(1),
    Arithmetic(2),
    Arithmetic(stepwise=True),
    Arithmetic(3, True),
    Arithmetic(4, True),
]


def spread(exact: Tensor, value: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference where there is something to compare."""
    wanted = ~exact.isnan()
    if not wanted.any():
        return 0.0, 0.0
    difference = (value.double() - exact.double())[wanted].abs()
    difference = torch.where(difference.isnan(), math.inf, difference)
    return difference.max().item(), difference.square().mean().sqrt().item()


def noise_of(
    config: Any,
    weights: Mapping[str, Tensor],
    inputs: dict,
    exact: Mapping[str, Tensor],
    dtypes: Sequence[str] = DTYPES,
    gradients: bool = True,
    mistakes: tuple = (),
) -> dict[str, Tensor]:
    """Stage -> (dtypes, 2): the largest and the root mean square difference from `exact`, the worst of
    several ways to order the sums and to round. Not less than half a unit in the last place of the largest
    number, a quarter of the typical one: to round a stage once more is no mistake. Twice that for gradients
    in half precision: others round within the backward pass of a step, where PyTorch's does not."""
    found = {name: torch.zeros(len(dtypes), 2, dtype=torch.float64) for name in exact}
    for row, name in enumerate(dtypes):
        dtype = getattr(torch, name)
        lowered = {key: w.to(dtype) for key, w in weights.items()}
        for do in WAYS[name]:
            values = truth(config, lowered, inputs, gradients, do=do, mistakes=mistakes)
            for stage, value in values.items():
                if stage in exact:
                    most = torch.tensor(spread(exact[stage], value), dtype=torch.float64)
                    found[stage][row] = torch.maximum(found[stage][row], most)
        eps = torch.finfo(dtype).eps
        for stage, value in exact.items():
            if dtype.itemsize == 2 and stage.startswith("grad."):
                found[stage][row] *= 2
            size = value[~value.isnan()].abs()
            if size.numel():
                least = torch.stack([size.max() * eps / 2, size.square().mean().sqrt() * eps / 4]).double()
                if stage == "loss":  # one number: that several ways come close to it is luck
                    least = least.new_full((2,), size.item() * eps)
                found[stage][row] = torch.maximum(found[stage][row], least)
    return found
