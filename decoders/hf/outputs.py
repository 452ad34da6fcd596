"""What the documented models return.

outputs = model(ids, labels=ids)
outputs.loss is outputs[0] is outputs["loss"]
outputs.past_key_values is outputs.cache      # the name of Transformers 5.24
"""

from collections import OrderedDict
from typing import Any

from decoders import decoding, heads, phi

from .seen_as import SeenAs

__all__ = [
    "ModelOutput",
    "OpenAIGPTDoubleHeadsModelOutput",
    "GenerateDecoderOnlyOutput",
    "GenerateBeamDecoderOnlyOutput",
]

# ---- Outputs -----------------------------------------------------------------------------------------------


class ModelOutput(OrderedDict):
    """By attribute, by name, by place. Names and places leave out what is None; attributes are None then.
    `cache` and `past_key_values` are the same."""

    def __init__(self, *content: Any, **named: Any):
        super().__init__(*content)
        for name, value in named.items():
            if value is not None:
                self[name] = value

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if OLDER.get(name, name) in RETURNED:
            return None
        raise AttributeError(f"the output has no {name!r}, only {', '.join(self)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, str):
            return super().__getitem__(OLDER.get(place, place))
        return self.to_tuple()[place]

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(OLDER.get(name, name), value)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(OLDER.get(name, name))

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(OLDER.get(name, name), default)

    def to_tuple(self) -> tuple:
        return tuple(self.values())

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return type(self), (dict(self.items()),)


OLDER = {"cache": "past_key_values"}  # the documented name of what Transformers 5.24 calls otherwise


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


class GenerateDecoderOnlyOutput(ModelOutput, SeenAs):
    """sequences, scores, logits, attentions, hidden_states, past_key_values."""

    theirs = ("transformers.generation.utils", "GenerateDecoderOnlyOutput")


class GenerateBeamDecoderOnlyOutput(ModelOutput, SeenAs):
    """The same, after the sequences their scores, after the logits `beam_indices`."""

    theirs = ("transformers.generation.utils", "GenerateBeamDecoderOnlyOutput")


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
