"""What the documented `generate` takes, by its documented names.

model.generate(ids, GenerationConfig(max_new_tokens=20), streamer=TextStreamer(tokenizer),
               logits_processor=LogitsProcessorList([TopKLogitsWarper(5)]))
"""

import inspect
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from decoders import decoding
from decoders.decoding import logits_processors as processors
from decoders.formats import find, read_json_if_any, switched

from .arguments import hub_options, nearest
from .tokenizer_base import PreTrainedTokenizerBase

__all__ = [
    "DisjunctiveConstraint",
    "GenerationConfig",
    "PhrasalConstraint",
    "LogitsProcessor",
    "LogitsProcessorList",
    "StoppingCriteria",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "EosTokenCriteria",
    "StopStringCriteria",
    "StoppingCriteriaList",
    "TextStreamer",
    "TextIteratorStreamer",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "PrefixConstrainedLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "LogitsWarper",
    "set_seed",
]

# ---- Settings ----------------------------------------------------------------------------------------------


class GenerationConfig(dict):
    """The settings of `generate`: an attribute each, the documented default where nothing else was said. As a
    dict it holds what was."""

    def __init__(self, **settings: Any):
        super().__init__(settings)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in DEFAULT_SETTINGS:
            return DEFAULT_SETTINGS[name]
        raise AttributeError(f"GenerationConfig has no {name!r}{nearest(name, DEFAULT_SETTINGS)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        config_file_name: str = "generation_config.json",
        **kwargs: Any,
    ) -> "GenerationConfig":
        hub, kwargs = hub_options(kwargs)
        folder = find(pretrained_model_name, weights=False, **hub)
        return cls(**{**read_json_if_any(folder / config_file_name), **kwargs})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> "GenerationConfig":
        return cls(**{**config_dict, **kwargs})

    @classmethod
    def from_model_config(cls, model_config: Any) -> "GenerationConfig":
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(model_config, name, None) for name in names}
        return cls(**{name: id for name, id in ids.items() if id is not None})

    def save_pretrained(
        self, save_directory: str | Path, config_file_name: str = "generation_config.json", **kwargs: Any
    ) -> None:
        with switched(Path(save_directory)) as new:
            (new / config_file_name).write_text(self.to_json_string(), "utf-8")

    def update(self, **kwargs: Any) -> dict:
        """Returns what is no setting."""
        super().update({key: value for key, value in kwargs.items() if key in DEFAULT_SETTINGS})
        return {key: value for key, value in kwargs.items() if key not in DEFAULT_SETTINGS}

    def to_dict(self) -> dict[str, Any]:
        return {**DEFAULT_SETTINGS, **self}

    def to_diff_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.items() if DEFAULT_SETTINGS.get(key) != value}

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"


DEFAULT_SETTINGS = {**vars(decoding.GenerationConfig()), "eos_token_id": None}
# What generate is documented to take, and what changes nothing for one device and without an encoder
WITHOUT_EFFECT = {
    "synced_gpus",
    "low_memory",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "decoder_start_token_id",
    "forced_decoder_ids",
    "cache_implementation",
    "cache_config",
    "return_legacy_cache",
    "disable_compile",
    "compile_config",
    "use_model_defaults",
    "trust_remote_code",
}

# ---- Processors --------------------------------------------------------------------------------------------


PhrasalConstraint, DisjunctiveConstraint = decoding.PhrasalConstraint, decoding.DisjunctiveConstraint


class LogitsProcessor:
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, V) scores, changed, after `input_ids` (rows, n)."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


LogitsWarper = LogitsProcessor
NEVER = float("-inf")  # what filters write; no other value is


class LogitsProcessorList(list):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for process in self:
            scores = process(input_ids, scores, **kwargs)
        return scores


def by_name(make: Callable) -> type:
    """The documented class of one of our processors, with the name and the arguments of `make`."""
    parts = {
        "__init__": lambda self, *args, **kwargs: vars(self).update(process=make(*args, **kwargs)),
        "__call__": lambda self, input_ids, scores: self.process(input_ids, scores),
        "__module__": __name__,
        "__signature__": inspect.signature(make),
    }
    return type(make.__name__, (LogitsProcessor,), parts)


def listed(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@by_name
def TemperatureLogitsWarper(temperature):
    return processors.temperature(temperature)


@by_name
def TopKLogitsWarper(top_k, filter_value=NEVER, min_tokens_to_keep=1):
    return processors.top_k(top_k, min_tokens_to_keep)


@by_name
def TopPLogitsWarper(top_p, filter_value=NEVER, min_tokens_to_keep=1):
    return processors.top_p(top_p, min_tokens_to_keep)


@by_name
def MinPLogitsWarper(min_p, filter_value=NEVER, min_tokens_to_keep=1):
    return processors.min_p(min_p, min_tokens_to_keep)


@by_name
def TypicalLogitsWarper(mass=0.9, filter_value=NEVER, min_tokens_to_keep=1):
    return processors.typical_p(mass, min_tokens_to_keep)


@by_name
def EpsilonLogitsWarper(epsilon, filter_value=NEVER, min_tokens_to_keep=1):
    return processors.epsilon_cutoff(epsilon, min_tokens_to_keep)


@by_name
def EtaLogitsWarper(epsilon, filter_value=NEVER, min_tokens_to_keep=1, device=None):
    return processors.eta_cutoff(epsilon, min_tokens_to_keep)


@by_name
def RepetitionPenaltyLogitsProcessor(penalty):
    return processors.repetition_penalty(penalty)


@by_name
def NoRepeatNGramLogitsProcessor(ngram_size):
    return processors.no_repeat_ngrams(ngram_size)


@by_name
def SequenceBiasLogitsProcessor(sequence_bias):
    rows = sequence_bias.items() if isinstance(sequence_bias, dict) else sequence_bias
    return processors.sequence_bias({tuple(ids): bias for ids, bias in rows})


@by_name
def NoBadWordsLogitsProcessor(bad_words_ids, eos_token_id=None):
    allowed = [[id] for id in listed(eos_token_id)]
    return processors.sequence_bias({tuple(ids): NEVER for ids in bad_words_ids if list(ids) not in allowed})


@by_name
def MinLengthLogitsProcessor(min_length, eos_token_id, device=None):
    return processors.suppress_tokens(listed(eos_token_id), lambda n: n < min_length)


@by_name
def MinNewTokensLengthLogitsProcessor(prompt_length_to_skip, min_new_tokens, eos_token_id, device=None):
    min_length = prompt_length_to_skip + min_new_tokens
    return processors.suppress_tokens(listed(eos_token_id), lambda n: n < min_length)


@by_name
def SuppressTokensLogitsProcessor(suppress_tokens, device=None):
    return processors.suppress_tokens(listed(suppress_tokens))


@by_name
def SuppressTokensAtBeginLogitsProcessor(begin_suppress_tokens, begin_index, device=None):
    return processors.suppress_tokens(listed(begin_suppress_tokens), lambda n: n == begin_index)


@by_name
def ForcedBOSTokenLogitsProcessor(bos_token_id):
    return processors.force_tokens([bos_token_id], 1)


@by_name
def ForcedEOSTokenLogitsProcessor(max_length, eos_token_id, device=None):
    return processors.force_tokens(listed(eos_token_id), max_length - 1)


@by_name
def ExponentialDecayLengthPenalty(exponential_decay_length_penalty, eos_token_id, input_ids_seq_length):
    start, factor = exponential_decay_length_penalty
    return processors.exponential_decay(start + input_ids_seq_length, factor, listed(eos_token_id))


@by_name
def PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, num_beams):
    return processors.prefix_allowed_tokens(prefix_allowed_tokens_fn, num_beams)


@by_name
def InfNanRemoveLogitsProcessor():
    return processors.remove_invalid_values


@by_name
def LogitNormalization():
    return processors.log_normalize


# ---- Criteria, streamers, chance ---------------------------------------------------------------------------


class StoppingCriteria:
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """True, or (rows,) booleans, where the text is over."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


class MaxLengthCriteria(StoppingCriteria):
    def __init__(self, max_length: int, max_position_embeddings: int | None = None):
        self.max_length = max_length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.max_length)


class MaxTimeCriteria(StoppingCriteria):
    def __init__(self, max_time: float, initial_timestamp: float | None = None):
        self.end = (time.time() if initial_timestamp is None else initial_timestamp) + max_time

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), time.time() > self.end)


class EosTokenCriteria(StoppingCriteria):
    def __init__(self, eos_token_id: int | list[int] | Tensor):
        self.ids = torch.as_tensor(eos_token_id).flatten()

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.ids.to(input_ids.device))


class StopStringCriteria(StoppingCriteria):
    def __init__(self, tokenizer: Any, stop_strings: str | list[str]):
        self.stops = decoding.stop_strings_criterion(stop_strings, tokenizer)

    def __call__(self, input_ids, scores, **kwargs):
        return self.stops(input_ids, scores)


class StoppingCriteriaList(list):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        over = torch.zeros(len(input_ids), dtype=torch.bool)
        for criterion in self:
            over = over | torch.as_tensor(criterion(input_ids, scores, **kwargs)).cpu()
        return over

    max_length = property(
        lambda self: next((one.max_length for one in self if hasattr(one, "max_length")), None)
    )


class TextStreamer:
    """Prints text as it is complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_prompt: bool = False, **decode_kwargs: Any):
        self.skip_prompt, self.begun = skip_prompt, False
        skip_special = decode_kwargs.get("skip_special_tokens", False)
        self.new_stream = partial(tokenizer.plain.stream, None, skip_special)
        self.stream = self.new_stream()

    def put(self, value: Tensor) -> None:
        ids = value if value.dim() == 1 else value[0]
        if value.dim() > 1 and len(value) > 1:
            raise ValueError("a streamer follows one text, not a batch")
        skipped, self.begun = self.skip_prompt and not self.begun, True
        if text := self.stream.put(ids[None] if skipped else ids.tolist()):
            self.on_finalized_text(text)

    def end(self) -> None:
        text, self.stream, self.begun = self.stream.end(), self.new_stream(), False
        self.on_finalized_text(text, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Gives the pieces to whoever iterates over it, in another thread."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ):
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout, self.text_queue = timeout, Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def __iter__(self) -> Iterator[str]:
        while (text := self.text_queue.get(timeout=self.timeout)) is not None:
            yield text


def set_seed(seed: int) -> None:
    """Of Python, NumPy where it is, and PyTorch."""
    import random
    import sys

    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
