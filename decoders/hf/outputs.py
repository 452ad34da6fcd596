"""What the documented models return: outputs and caches, for `hf.py`.

outputs = model(ids, labels=ids)
outputs.loss is outputs[0] is outputs["loss"]
model(more, past_key_values=outputs.past_key_values)      # as often as you like, from the same cache
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from decoders import decoding, heads, phi

__all__ = [
    "ModelOutput",
    "OpenAIGPTDoubleHeadsModelOutput",
    "GenerateDecoderOnlyOutput",
    "GenerateBeamDecoderOnlyOutput",
    "Cache",
    "DynamicCache",
]

# ---- Outputs -----------------------------------------------------------------------------------------------


class ModelOutput(OrderedDict):
    """By attribute, by name, by place. Names and places leave out what is None; attributes are None then."""

    def __init__(self, *content: Any, **named: Any):
        super().__init__(*content, **{name: value for name, value in named.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in RETURNED:
            return None
        raise AttributeError(f"the output has no {name!r}, only {', '.join(self)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, place: Any) -> Any:
        return super().__getitem__(place) if isinstance(place, str) else self.to_tuple()[place]

    def to_tuple(self) -> tuple:
        return tuple(self.values())


class OpenAIGPTDoubleHeadsModelOutput(ModelOutput):
    """`logits` are (B, choices, T, V), `mc_logits` (B, choices)."""

    def __init__(
        self,
        loss: Any = None,
        mc_loss: Any = None,
        logits: Any = None,
        mc_logits: Any = None,
        past_key_values: Any = None,
        hidden_states: Any = None,
        attentions: Any = None,
    ):
        named = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if isinstance(loss, dict | list):  # a copy, from names and values
            named = dict(loss)
        super().__init__(**named)


class GenerateDecoderOnlyOutput(ModelOutput):
    """sequences, scores, logits, attentions, hidden_states, past_key_values."""


class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """The same, after the sequences their scores, after the logits `beam_indices`."""


RETURNED = {
    name
    for part in (
        phi.ModelOutput,
        phi.CausalLMOutput,
        heads.QuestionAnsweringOutput,
        heads.DoubleHeadsOutput,
        decoding.GenerateOutput,
    )
    for name in part._fields
}
GENERATED = (
    "sequences",
    "sequences_scores",
    "scores",
    "logits",
    "beam_indices",
    "attentions",
    "hidden_states",
    "past_key_values",
)  # in the documented order


# ---- Caches ------------------------------------------------------------------------------------------------


class Cache(tuple):
    """The keys and values that a pass returns: a tuple of each layer's (k, v), (B, K, S, D). Passes that go
    on from it leave it as it is, however many do: the first one writes into the memory behind it, and any
    other one takes memory of its own."""

    @classmethod
    def of(cls, plain: Any) -> "Cache":
        self = cls(plain[layer] for layer in range(len(plain.lengths)))
        self.plain, self.taken = plain, False
        return self

    def branch(self) -> Any:
        """The family's own cache, to go on with."""
        other = copy.copy(self.plain)
        other.buffers, other.lengths = list(other.buffers), list(other.lengths)
        if self.taken:
            other.truncate(len(other))  # no room behind: the next token finds a new place
        self.taken = True
        return other

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self[layer_idx][0].shape[2] if self else 0

    def to_legacy_cache(self) -> tuple:
        return tuple(self)


class DynamicCache:
    """A cache that the caller holds, and that each pass it is given to makes longer."""

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = ()):
        self.past = past

    from_legacy_cache = classmethod(lambda cls, past=None: cls(past or ()))

    def to_legacy_cache(self) -> tuple:
        return tuple(self.past)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past[layer_idx][0].shape[2] if self.past else 0

    def crop(self, max_length: int) -> None:
        """Forget all but the first positions; a negative number forgets so many."""
        n = max_length if max_length >= 0 else self.get_seq_length() + max_length
        self.past = tuple((k[:, :, :n], v[:, :, :n]) for k, v in self.past)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.past = tuple((k[beam_idx], v[beam_idx]) for k, v in self.past)

    def __len__(self) -> int:
        return len(self.past)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.past[layer]


def branched(past: Any) -> Any:
    """What a model of ours goes on from, for any documented kind of cache."""
    past = past.past if isinstance(past, DynamicCache) else past
    past = past.branch() if isinstance(past, Cache) else past
    return None if past is None or isinstance(past, Sequence) and not len(past) else past
