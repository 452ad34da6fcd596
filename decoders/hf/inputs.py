"""What is wrong with the arguments of a pass that failed: asked only then, so that a pass pays nothing."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32)
SWITCHES = ("use_cache", "output_attentions", "output_hidden_states")


def wrong_argument(error: Exception, inputs: dict[str, Any], model: Any) -> ValueError | None:
    """A sentence about the first argument of `forward` that cannot be; None where all could be."""
    for name, wanted in problems(error, inputs, model):
        return ValueError(f"{name} must be {wanted}, not {described(inputs[name])}")
    return None


def problems(error: Exception, inputs: dict[str, Any], model: Any) -> Iterator[tuple[str, str]]:
    """(argument, what it must be) of each that is wrong."""
    for name in SWITCHES:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.numel() != 1:
            yield name, "True, False or None"
    C = model.config.hidden_size
    embeds = inputs.get("inputs_embeds")
    if embeds is not None and not (isinstance(embeds, Tensor) and embeds.shape[-1] == C):
        yield "inputs_embeds", f"a tensor (B, T, {C})"
    ids = inputs.get("input_ids") if embeds is None else embeds[..., 0]
    if isinstance(ids, Tensor) and ids.dim() == 2:
        positions = model.config.max_position_embeddings
        yield from problems_of_positions(error, inputs.get("position_ids"), ids, positions)
        yield from problems_of_outputs(error, inputs, ids, model.can_generate())
    if isinstance(inputs.get("past_key_values"), list | tuple):
        yield "past_key_values", "a cache that a pass of this model returned, of as many sequences"


def problems_of_positions(
    error: Exception, position_ids: Any, ids: Tensor, positions: int
) -> Iterator[tuple[str, str]]:
    B, T = ids.shape
    if position_ids is None:
        return
    shape = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else None
    if shape not in ((T,), (1, T), (B, T)) or position_ids.dtype not in INTEGERS:
        yield "position_ids", f"an integer tensor ({T},) or ({B}, {T})"
    elif isinstance(error, IndexError) and not is_within(position_ids, 0, positions):
        yield "position_ids", f"numbers from 0 to {positions - 1}"


def problems_of_outputs(
    error: Exception, inputs: dict[str, Any], ids: Tensor, of_tokens: bool
) -> Iterator[tuple[str, str]]:
    """Of the labels, which a model `of_tokens` has for each token, and of `logits_to_keep`."""
    B, T = ids.shape
    kept = inputs.get("logits_to_keep")
    if kept is not None and not is_kept(kept, T):
        yield "logits_to_keep", f"a number, or an integer tensor (n,) of places below {T}"
    labels = inputs.get("labels")
    if labels is None:
        return
    if str(error).startswith("Target"):
        yield "labels", "-100, or numbers of classes (token ids)"
    elif not isinstance(labels, Tensor):
        yield "labels", "a tensor"
    elif of_tokens and (labels.dtype != torch.int64 or labels.shape != ids.shape):
        yield "labels", f"an int64 tensor ({B}, {T})"


# ---- What an argument may be -------------------------------------------------------------------------------


def is_kept(value: Any, T: int) -> bool:
    if isinstance(value, int):
        return True
    listed = isinstance(value, Tensor) and value.dim() == 1 and value.dtype in INTEGERS
    return listed and is_within(value, -T, T)


def is_within(value: Tensor, low: int, high: int) -> bool:
    return bool(((value >= low) & (value < high)).all())


def described(value: Any) -> str:
    """Example: "a tensor (2, 3) of float32"."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"{type(value).__name__} {value!r:.40}"
