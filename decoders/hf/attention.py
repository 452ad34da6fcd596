"""What is done to the attention of a loaded model: another implementation, fewer heads."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from decoders.formats import family_type

__all__ = ["attentions_of"]


def attentions_of(model: nn.Module) -> list[nn.Module]:
    """The attention modules, a layer each."""
    return [part for part in model.modules() if hasattr(type(part), "attend")]


# ---- Which implementation ----------------------------------------------------------------------------------


def eager(
    attend: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    need_weights: bool = False,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The formula, also where nobody wants to see the weights."""
    T, S = q.shape[2], k.shape[2]
    if attn_mask is None and T > 1:
        nothing = torch.full((T, S), float("-inf"), dtype=q.dtype, device=q.device)
        attn_mask = nothing.triu(S - T + 1)
    y, weights = attend(q, k, v, attn_mask, scale, dropout, True, *rest)
    return y, weights if need_weights else None


def set_attention(model: nn.Module, kind: str | None) -> nn.Module:
    """ "sdpa": PyTorch's kernels, and ours; "eager": the formula; "flash_attention_2": as PyTorch has it.
    None is "sdpa", and leaves the config as it is."""
    asked, kind = kind, kind or "sdpa"
    if kind == "flash_attention_2":
        check_flash_attention()
    elif kind not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation must be 'sdpa', 'eager' or 'flash_attention_2', not {kind!r}")
    for part in attentions_of(model):
        if kind == "eager":
            part.attend = partial(eager, type(part).attend)
        elif isinstance(vars(part).get("attend"), partial) and part.attend.func is eager:
            del part.attend
    if asked is not None:
        model.config._attn_implementation = asked
    return model


def check_flash_attention() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8:
        return
    raise ValueError(
        "attn_implementation='flash_attention_2' needs an NVIDIA GPU of compute capability 8.0 or more, "
        "and there is none: leave it out, the default is the fastest here"
    )


# ---- Pruning -----------------------------------------------------------------------------------------------


def prune(model: nn.Module, layer: int, heads: Sequence[int]) -> None:
    """Cut the heads with these numbers, of the unpruned model, out of q, k, v and what reads them."""
    if family_type(model.config.model_type) not in ("gpt_neo", "openai-gpt"):
        raise NotImplementedError(
            f"heads of {type(model).__name__} cannot be pruned: no version of Transformers does it either"
        )
    part = attentions_of(model)[layer]
    n = heads_left(part)
    numbers = getattr(part, "heads", [*range(n)])
    kept = [place for place, head in enumerate(numbers) if head not in heads]
    if not kept or not {*heads} <= {*range(model.config.num_attention_heads)}:
        raise ValueError(f"layer {layer} has the heads {numbers}: {sorted(heads)} cannot be pruned")
    rows = rows_of_heads(part, kept)
    if hasattr(part, "c_attn"):
        prune_fused(part, rows, n * part.head_dim)
    else:
        prune_separate(part, rows)
    part.heads = [numbers[place] for place in kept]


def heads_left(part: nn.Module) -> int:
    if hasattr(part, "c_attn"):
        return part.c_proj.weight.shape[0] // part.head_dim
    return part.out_proj.weight.shape[1] // part.head_dim


def rows_of_heads(part: nn.Module, heads: list[int]) -> Tensor:
    """Indices of the rows of a projection that belong to these heads."""
    device = next(part.parameters()).device
    inside = torch.arange(part.head_dim, device=device)
    return (torch.tensor(heads, device=device)[:, None] * part.head_dim + inside).flatten()


def prune_fused(part: nn.Module, rows: Tensor, width: int) -> None:
    """GPT-1: a transposed matrix (C, 3 * width) for q, k and v."""
    columns = torch.cat([rows, rows + width, rows + 2 * width])
    select(part.c_attn, "weight", (slice(None), columns))
    select(part.c_attn, "bias", columns)
    select(part.c_proj, "weight", rows)


def prune_separate(part: nn.Module, rows: Tensor) -> None:
    """GPT-Neo: a matrix each for q, k and v."""
    for projection in (part.q_proj, part.k_proj, part.v_proj):
        for name, _ in [*projection.named_parameters()]:
            select(projection, name, rows)
        projection.out_features = len(rows)
    select(part.out_proj, "weight", (slice(None), rows))
    part.out_proj.in_features = len(rows)


def select(module: nn.Module, name: str, index: Tensor | tuple) -> None:
    """Keep these rows of a parameter."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(old.data[index].clone(), old.requires_grad))
