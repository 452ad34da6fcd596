"""A model of 8 or 4 bits: layer by layer, in place; what a folder of such says; what it costs."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from . import native
from .int8_cache import new_cache
from .quantized import (
    INT8_GROUPS,
    KINDS,
    PREFILL,
    Quantized,
    QuantizedEmbedding,
    default_tensors,
    empty_as_stored,
    kind_of,
)

M = TypeVar("M", bound=nn.Module)
VERSION = 1  # of the format in a folder: a change needs another reader
MIXED = "mixed"  # layers of several kinds, as packed files have them

# ---- A model -----------------------------------------------------------------------------------------------


def quantize(model: nn.Module, kind: str, skip: Iterable[str] = (), prefill: str | None = None) -> nn.Module:
    """Quantize the weights of `model`, in place and for good, layer by layer: every linear layer but those
    whose name or last part of it is in `skip`. Embeddings, norms and biases stay. An output layer that was
    tied to the embedding is not any more. `kind` is "int8", "int8-weights" or "int4" (see `KINDS`).
    `prefill`: see `set_prefill`.

    ValueError for another kind, a name in `skip` that no layer has, a model that is quantised already.
    """
    for name, layer in linear_layers(model, kind, skip).items():
        weight = layer.weight
        replace_module(model, name, Quantized.from_weight(layer, kind, weight, weight.device, name))
    return set_prefill(mark_quantized(model, kind), prefill)


def set_prefill(model: M, prefill: str | None) -> M:
    """Say what products of more than 16 rows do with layers of int4: "int8" rounds their input to 8 bits too,
    "exact" leaves it as it is. The default of layers that `quantize` made is "int8", of a packed file's bits
    "exact". None: as it was. Saving keeps it. ValueError for another."""
    if prefill not in (*PREFILL, None):
        raise ValueError(f"prefill must be one of {', '.join(PREFILL)}, not {prefill!r}")
    for module in model.modules():
        if prefill is not None and isinstance(module, Quantized) and module.kind == "int4":
            module.prefill = prefill
    note_prefill(model)
    return model


def note_prefill(model: Any) -> None:
    """In what is saved of the config: the `prefill` of the layers of int4, where there are some."""
    entry = getattr(model, "config_json", {}).get("quantization_config") or {}
    kinds = {m.prefill for m in model.modules() if isinstance(m, Quantized) and m.kind == "int4"}
    if kinds and entry.get("quant_method") == "decoders":
        entry["prefill"] = "exact" if "exact" in kinds else "int8"


def linear_layers(model: nn.Module, kind: str, skip: Iterable[str] = ()) -> dict[str, Any]:
    """Name -> layer, of what is to be quantised."""
    if kind not in (*KINDS, INT8_GROUPS, MIXED):
        raise ValueError(f"quantize must be one of {', '.join(KINDS)}, not {kind!r}")
    if is_quantized(model):
        raise ValueError("the model is quantised already")
    layers = {
        name: m for name, m in model.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"
    }
    names = {name: {name, name.rpartition(".")[2]} for name in layers}
    if unknown := set(skip).difference(*names.values()) if layers else set(skip):
        raise ValueError(f"skip: no linear layer is called {', '.join(sorted(unknown))}")
    return {name: m for name, m in layers.items() if not names[name] & set(skip)}


def embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """Name -> embedding."""
    return {name: m for name, m in model.named_modules() if type(m) is nn.Embedding}


def replace_embedding(model: nn.Module, name: str, table: Quantized) -> None:
    """Put an embedding of `table` where `name` is in `model`, in the dtype that is there."""
    old: Any = model.get_submodule(name)
    replace_module(model, name, QuantizedEmbedding(table, old.weight.dtype, old.padding_idx))


def set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Embeddings of 8 or 4 bits give numbers of `dtype`."""
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding):
            module.dtype = dtype


def put_bits(model: nn.Module, name: str, tensors: dict[str, Tensor], device: str | torch.device) -> None:
    """A layer or an embedding of `tensors` (see `stored_bits`) where `name` is in `model`. Its long inputs
    are not rounded: a packed model computes what its bits say."""
    layer: Any = model.get_submodule(name)
    table = Quantized.of_tensors(layer, kind_of(tensors), tensors, device)
    table.prefill = "exact"
    if isinstance(layer, nn.Embedding):
        replace_embedding(model, name, table)
    else:
        replace_module(model, name, table)


def mark_packed(model: nn.Module) -> None:
    """`mark_quantized` of whatever kinds the layers have."""
    kinds = {m.kind for m in model.modules() if isinstance(m, Quantized)}
    has_embedding = any(isinstance(m, QuantizedEmbedding) for m in model.modules())
    if kinds:
        mark_quantized(model, MIXED if len(kinds) > 1 or has_embedding else kinds.pop())


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `name` is in `model`."""
    parent, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(parent), own_name, layer)


def mark_quantized(model: Any, kind: str) -> nn.Module:
    """What follows of it: nothing is trained, a quantised output layer is tied to nothing, saving says so."""
    model.requires_grad_(False)
    if isinstance(getattr(model, "lm_head", None), Quantized):
        model.config.tie_word_embeddings = False
    entry = {"quant_method": "decoders", "version": VERSION, "weights": kind}
    model.config_json["quantization_config"] = entry
    note_prefill(model)
    if native.library() is None and not native.is_pending():
        warnings.warn(
            f"kernels.c is {native.status()} (it takes Linux, gcc, and AVX2 or Arm's dot products): "
            "weights of 8 and 4 bits save memory, but not time",
            stacklevel=3,
        )
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether a layer of `model` has 8 or 4 bits."""
    return any(isinstance(m, Quantized) for m in model.modules())


def expect_quantized(model: Any, stored: Callable[[str], Tensor | None]) -> None:
    """In a model on the meta device, whose config tells of 8 or 4 bits: empty layers for those stored so.
    `stored(name)` is the folder's tensor of that name, or None."""
    entry = model.config_json.get("quantization_config")
    if not entry:
        return
    if (version := entry.get("version")) != VERSION:
        raise ValueError(f"quantised in version {version!r}, and this reads {VERSION}: quantise it again")
    kind = entry.get("weights")
    own = None if kind == MIXED else kind
    for name, layer in linear_layers(model, kind).items():
        if stored(f"{name}.qweight") is not None:
            replace_module(model, name, empty_as_stored(layer, own, lambda end: stored(f"{name}.{end}")))  # noqa: B023
    for name, embedding in embeddings(model).items():
        if stored(f"{name}.table.qweight") is not None:
            table = empty_as_stored(embedding, own, lambda end: stored(f"{name}.table.{end}"))  # noqa: B023
            replace_embedding(model, name, table)
    mark_quantized(model, kind)
    set_prefill(model, entry.get("prefill") or unsaid_prefill(model, kind))


def unsaid_prefill(model: nn.Module, kind: str) -> str | None:
    """Of a folder that was saved before `prefill` was. "exact" where the bits are a packed file's: of several
    kinds, or other tensors than `quantize` makes. Those by groups of 32 with a zero may be of either, and are
    taken for its own (None)."""
    for layer in (m for m in model.modules() if isinstance(m, Quantized) and m.kind == "int4"):
        tensors = {name: (t.dtype, tuple(t.shape)) for name, t in layer.named_buffers()}
        if kind == MIXED or tensors != default_tensors("int4", layer.in_features, layer.out_features):
            return "exact"
    return None


# ---- What it costs -----------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What fewer bits cost on a text."""

    logits: float  # |difference| / |logits|, of all positions together
    perplexity: float
    before: float  # the unquantised model's perplexity


@torch.no_grad()
def error(
    model: nn.Module,
    ids: Tensor,
    kind: str | None = None,
    skip: Iterable[str] = (),
    *,
    cache: str | None = None,
    prefill: str | None = None,
    **inputs: Tensor,
) -> Cost:
    """`model`, which is not quantised, against a copy of `kind` on ids (B, T), two tokens at least; with
    `cache` "int8", against keys and values of 8 bits, alone or beside weights of `kind`. `prefill`: see
    `set_prefill`."""
    if kind is None and cache is None:
        raise ValueError(f"of what: kind, one of {', '.join(KINDS)}, or cache='int8'?")
    other = model if kind is None else quantize(copy.deepcopy(model), kind, skip, prefill)
    arguments = {"input_ids": ids, "labels": ids, **inputs}
    caches = [{"past_key_values": new_cache(model, kind)} if cache else {} for kind in (None, cache)]
    exact, rounded = model(**arguments, **caches[0]), other(**arguments, **caches[1])
    logits = exact.logits.double()
    difference = (rounded.logits.double() - logits).norm() / logits.norm()
    return Cost(difference.item(), rounded.loss.double().exp().item(), exact.loss.double().exp().item())
