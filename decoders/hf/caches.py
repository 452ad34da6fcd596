"""Key/value caches by their documented names, and Transformers' own as what a model of ours reads and writes.

outputs = model(ids, use_cache=True)
model(more, past_key_values=outputs.past_key_values)      # as often as you like, from the same cache
cache = DynamicCache()                                    # or one of Transformers'
model(ids, past_key_values=cache)                         # grows in place
"""

import copy
import importlib
from collections.abc import Iterator, Sequence
from functools import cache as memoized
from typing import Any

import torch
from torch import Tensor

from decoders import phi

from .seen_as import SeenAs

__all__ = ["Cache", "DynamicCache", "StaticCache"]

# ---- Ours --------------------------------------------------------------------------------------------------


class Positions:
    """What can be done to a documented cache. `plain` is the family's own, or None as long as it is empty."""

    plain: Any

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions are cached."""
        lengths = self.plain.lengths if self.plain is not None else []
        return lengths[layer_idx] if layer_idx < len(lengths) else 0

    def crop(self, max_length: int) -> None:
        """Forget all but the first positions; a negative number forgets so many."""
        n = max_length if max_length >= 0 else self.get_seq_length() + max_length
        if n < self.get_seq_length():
            self.plain = copy.copy(self.plain)
            self.plain.truncate(max(0, n))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was."""
        if self.plain is not None:
            self.plain = copy.copy(self.plain)
            self.plain.reorder(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence as many times, one copy below the other."""
        if len(self):
            k, _ = self[0]
            self.reorder_cache(torch.arange(len(k), device=k.device).repeat_interleave(repeats))

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """A tuple of each layer's (k, v), (B, K, S, D)."""
        return tuple(self)

    def __len__(self) -> int:
        return 0 if self.plain is None else len(self.plain.lengths)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.plain[layer] for layer in range(len(self)))

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return tuple(self)[layer]
        if not -len(self) <= layer < len(self):
            raise IndexError(f"the cache has {len(self)} layers, and none of number {layer}")
        return self.plain[layer % len(self)]


class Cache(SeenAs, Positions, tuple):
    """The keys and values that a pass returns: a tuple of each layer's (k, v), (B, K, S, D). Passes that go
    on from it leave it as it is, however many do: the first one writes into the memory behind it, and any
    other one takes memory of its own."""

    theirs = ("transformers.cache_utils", "Cache")

    @classmethod
    def of(cls, plain: Any) -> "Cache":
        self = cls()
        self.plain, self.taken = plain, False
        return self

    def __getattr__(self, name: str) -> Any:
        """accelerate makes tuples anew from what they hold: then that is the cache."""
        if name not in ("plain", "taken"):
            raise AttributeError(f"Cache has no {name!r}")
        self.plain, self.taken = phi.KVCache(tuple.__iter__(self)), True
        return vars(self)[name]

    def branch(self) -> Any:
        """The family's own cache, to go on with."""
        other = copy.copy(self.plain)
        other.buffers, other.lengths = list(other.buffers), list(other.lengths)
        if self.taken:
            other.truncate(len(other))  # no room behind: the next token finds a new place
        self.taken = True
        return other

    def crop(self, max_length: int) -> None:
        super().crop(max_length)
        self.taken = True  # what stands behind may be another's

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return Cache.of, (self.plain,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} layers, {self.get_seq_length()} positions)"


class DynamicCache(SeenAs, Positions):
    """A cache that the caller holds, and that each pass it is given to makes longer."""

    theirs = ("transformers.cache_utils", "DynamicCache")

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = (), config: Any = None, **kwargs: Any):
        self.plain = None
        self.initial = tuple(past or ())

    @classmethod
    def from_legacy_cache(cls, past_key_values: Any = None) -> "DynamicCache":
        return cls(past_key_values or ())

    def __len__(self) -> int:
        return len(self.initial) if self.plain is None else super().__len__()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.initial) if self.plain is None else super().__iter__()

    def __getitem__(self, layer: Any) -> Any:
        return self.initial[layer] if self.plain is None else super().__getitem__(layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.plain is None:
            return self.initial[layer_idx][0].shape[2] if layer_idx < len(self.initial) else 0
        return super().get_seq_length(layer_idx)

    def crop(self, max_length: int) -> None:
        """Forget all but the first positions; a negative number forgets so many."""
        if self.plain is None:
            n = max_length if max_length >= 0 else self.get_seq_length() + max_length
            self.initial = tuple((k[:, :, :n], v[:, :, :n]) for k, v in self.initial)
        super().crop(max_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.plain is None:
            self.initial = tuple((k[beam_idx], v[beam_idx]) for k, v in self.initial)
        super().reorder_cache(beam_idx)

    batch_select_indices = reorder_cache

    def reset(self) -> None:
        """Forget all."""
        self.plain, self.initial = None, ()

    def for_family(self, kind: type) -> Any:
        """The family's own cache behind it, which the pass makes longer."""
        if not isinstance(self.plain, kind):
            self.plain = kind(tuple(self))
        return self.plain


class StaticCache(DynamicCache):
    """The same with an end: `max_cache_len` positions, and a ValueError for more."""

    theirs = ("transformers.cache_utils", "StaticCache")

    def __init__(self, config: Any = None, max_cache_len: int | None = None, **kwargs: Any):
        super().__init__()
        if max_cache_len is None:
            raise ValueError("StaticCache needs max_cache_len, the number of positions it may hold")
        self.max_cache_len = max_cache_len

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.max_cache_len

    def check(self) -> None:
        """ValueError if it holds more than it may."""
        if (n := self.get_seq_length()) > self.max_cache_len:
            self.crop(self.max_cache_len)
            raise ValueError(f"{n} positions do not fit into a StaticCache of {self.max_cache_len}")


# ---- Transformers' -----------------------------------------------------------------------------------------


class OthersCache:
    """One of Transformers' caches as a family's own: every pass writes into it. Those that keep a sliding
    window only are padded in front with zeros, which the window hides."""

    def __init__(self, others: Any):
        self.others = others

    @property
    def lengths(self) -> list[int]:
        return [int(self.others.get_seq_length(layer)) for layer in range(layers_of(self.others))]

    def __len__(self) -> int:
        return int(self.others.get_seq_length())

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        n = self.lengths[layer]
        if hasattr(self.others, "layers"):
            keys, values = self.others.layers[layer].keys, self.others.layers[layer].values
        else:
            keys, values = self.others.key_cache[layer], self.others.value_cache[layer]
        return all_positions(keys, n), all_positions(values, n)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(layers_of(self.others)))

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past = int(self.others.get_seq_length(layer))
        n = past + k.shape[2]
        more = {"cache_position": torch.arange(past, n, device=k.device)}
        k, v = self.others.update(k, v, layer, more)[:2]
        return all_positions(k, n), all_positions(v, n)

    def truncate(self, n: int) -> None:
        if (gone := len(self) - n) > 0:
            self.others.crop(-gone)

    def reorder(self, index: Tensor) -> None:
        rows = torch.arange(len(index), device=index.device)
        if len(self) and not (len(index) == self[0][0].shape[0] and torch.equal(index, rows)):
            self.others.batch_select_indices(index)


def layers_of(others: Any) -> int:
    """How many layers it has; up to 4.5x it is two lists of tensors."""
    return len(others.layers if hasattr(others, "layers") else others.key_cache)


def all_positions(states: Tensor, n: int) -> Tensor:
    """(B, K, n, D) of a buffer that is longer, or that holds the last ones only."""
    missing = n - states.shape[2]
    if missing <= 0:
        return states[:, :, :n]
    before = states.new_zeros(*states.shape[:2], missing, states.shape[3])
    return torch.cat([before, states], dim=2)


@memoized
def others_class(kind: type) -> type:
    return type(f"{kind.__name__}OfTransformers", (OthersCache, kind), {"__module__": __name__})


# ---- Whichever ---------------------------------------------------------------------------------------------


def cache_class(model: Any) -> type:
    """The family's KVCache."""
    return importlib.import_module(model.config_class.plain_class.__module__).KVCache


def grows_in_place(past: Any) -> bool:
    """Whether the caller holds the cache, so that passes change it."""
    return isinstance(past, DynamicCache) or is_others(past)


def is_others(past: Any) -> bool:
    layered = hasattr(past, "layers") or hasattr(past, "key_cache")
    return layered and hasattr(past, "update") and hasattr(past, "get_seq_length")


def plain_cache(past: Any, kind: type) -> Any:
    """What a model of ours goes on from, for any documented kind of cache. None for none."""
    if past is None or isinstance(past, kind):
        return past
    if isinstance(past, DynamicCache):
        return past.for_family(kind)
    if isinstance(past, Cache):
        return past.branch()
    if is_others(past):
        return others_class(kind)(past)
    if not isinstance(past, Sequence) or not all(is_pair_of_tensors(layer) for layer in past):
        wanted = "a cache that a pass returned, a DynamicCache, or a tuple of each layer's (k, v)"
        raise ValueError(f"past_key_values must be {wanted}, not {type(past).__name__}")
    return kind(past) if len(past) else None


def is_pair_of_tensors(layer: Any) -> bool:
    """Whether it is (k, v) of one layer, (B, K, S, D) each."""
    return (
        isinstance(layer, Sequence)
        and len(layer) == 2
        and all(isinstance(part, Tensor) and part.dim() == 4 for part in layer)
    )


def documented_cache(past: Any, new: Any) -> Any:
    """What comes back for `new`, the family's own: the caller's `past`, if that grows in place."""
    if new is None:
        return None
    if is_others(past):
        if not isinstance(new, OthersCache):  # the whole text was read anew
            past.reset()
            for layer, (k, v) in enumerate(new):
                past.update(k, v, layer)
        return past
    if not isinstance(past, DynamicCache):
        return new.others if isinstance(new, OthersCache) else Cache.of(new)
    past.plain = new
    if isinstance(past, StaticCache):
        past.check()
    return past
