"""The settings of `generate`: documented names and defaults, and checks that they can be honoured."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch.nn as nn
from torch import Tensor


@dataclass
class GenerationConfig:
    """Documented names and defaults. None means off."""

    # How long
    max_length: int | None = 20  # ids in all, the prompt counted; as the default 20 new ones
    max_new_tokens: int | None = None  # wins over max_length
    min_length: int | None = 0  # no stop id before so many ids in all
    min_new_tokens: int | None = None  # wins over min_length
    max_time: float | None = None  # seconds after which the sequence ends
    stop_strings: str | list[str] | None = None  # text after which it ends; needs `tokenizer`
    # Which strategy
    do_sample: bool | None = False  # sample instead of taking the best
    num_beams: int = 1  # beams of beam search
    num_beam_groups: int = 1  # diverse beam search: groups of beams that keep apart
    diversity_penalty: float | None = 0.0  # taken from what earlier groups choose in the same step
    early_stopping: bool | str | None = False  # True: at num_beams ended beams; "never": none can be better
    length_penalty: float = 1.0  # sums of beams are divided by length ** this
    penalty_alpha: float | None = None  # contrastive search with top_k: weight of being unlike the past
    dola_layers: str | list[int] | None = None  # "low", "high" or layers whose prediction is taken away
    force_words_ids: Any = None  # phrases of ids that must come, or lists of phrases of which one must
    constraints: Any = None  # the same as PhrasalConstraint and DisjunctiveConstraint
    guidance_scale: float | None = (
        None  # classifier-free guidance (CFG): above 1 away from the negative prompt
    )
    use_cache: bool | None = True
    prefill_chunk_size: int | None = None  # a prompt is read so many tokens at a time: less memory at once
    compiled: bool | None = False  # steps as one graph of torch.compile: see kernels.compile
    # Filters, which are for sampling
    temperature: float | None = 1.0  # below 1 safer, above bolder
    top_k: int | None = 50  # the k most probable tokens
    top_p: float | None = 1.0  # nucleus sampling: the most probable tokens whose probabilities sum to p
    min_p: float | None = None  # at least this share of the largest probability
    typical_p: float | None = 1.0  # those of about the expected surprise, whose probabilities sum to p
    epsilon_cutoff: float | None = 0.0  # at least this probability
    eta_cutoff: float | None = 0.0  # the same, less where many tokens are as probable
    # Penalties and bans
    repetition_penalty: float | None = 1.0  # above 1: away from tokens seen before
    no_repeat_ngram_size: int | None = 0  # no n-gram twice
    bad_words_ids: list[list[int]] | None = None  # never these
    sequence_bias: Any = None  # {(ids): number to add} or [[ids, number]]
    suppress_tokens: list[int] | None = None  # never these
    begin_suppress_tokens: list[int] | None = None  # not as the first new token
    forced_bos_token_id: int | None = None  # the second token of all
    forced_eos_token_id: int | list[int] | None = None  # the last one when max_length is reached
    exponential_decay_length_penalty: Sequence[float] | None = None  # (start, factor): stop ids gain score
    remove_invalid_values: bool | None = False  # NaN and infinities become numbers
    renormalize_logits: bool | None = False  # log-probabilities, after all else
    # Speculative (assisted) decoding
    prompt_lookup_num_tokens: int | None = None  # draft at most so many from an earlier place of the text
    max_matching_ngram_size: int | None = None  # found by as many last tokens at most; None: 2
    num_assistant_tokens: int | None = 20  # drafted by assistant_model at most
    num_assistant_tokens_schedule: str | None = "heuristic"  # more after success, fewer after failure
    assistant_confidence_threshold: float | None = 0.4  # the assistant ends where it is less sure
    # What comes back
    num_return_sequences: int = 1  # sequences for each prompt
    return_dict_in_generate: bool | None = False
    output_scores: bool | None = False  # after all processors
    output_logits: bool | None = False  # before
    output_attentions: bool | None = False
    output_hidden_states: bool | None = False
    # Tokens
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | str | None = "checkpoint"  # None never stops

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance (CFG) is on."""
        return self.guidance_scale not in (None, 1)

    @property
    def contrastive(self) -> bool:
        return self.penalty_alpha is not None


@dataclass
class Arguments:
    """What `generate` takes beside settings: tensors, functions, objects."""

    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None
    stopping_criteria: Sequence[Callable] | None = None
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None
    assistant_model: Any = None
    streamer: Any = None
    negative_prompt_ids: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    tokenizer: Any = None
    generator: Any = None
    past_key_values: Any = None
    inputs_embeds: Tensor | None = None


# Names of other libraries, and what means the same here
MEANT = {
    "beam_size": "num_beams",
    "beam_width": "num_beams",
    "beams": "num_beams",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "draft_model": "assistant_model",
    "frequency_penalty": "repetition_penalty",
    "kv_cache": "past_key_values",
    "logit_bias": "sequence_bias",
    "logits_processors": "logits_processor",
    "max_gen_len": "max_new_tokens",
    "max_gen_toks": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_tokens_to_sample": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "n": "num_return_sequences",
    "n_beams": "num_beams",
    "n_predict": "max_new_tokens",
    "negative_prompt": "negative_prompt_ids",
    "num_samples": "num_return_sequences",
    "num_tokens": "max_new_tokens",
    "past": "past_key_values",
    "presence_penalty": "repetition_penalty",
    "prompt_ids": "input_ids",
    "repeat_penalty": "repetition_penalty",
    "rep_pen": "repetition_penalty",
    "sample": "do_sample",
    "seed": "generator",
    "stop": "stop_strings",
    "stop_sequence": "stop_strings",
    "stop_sequences": "stop_strings",
    "stop_token_ids": "eos_token_id",
    "stop_tokens": "eos_token_id",
    "stop_words": "stop_strings",
    "temp": "temperature",
    "typical": "typical_p",
}

SETTINGS = {field.name for field in fields(GenerationConfig)}
TINY, HUGE = 1e-30, 1e30
SWITCHES = (
    "do_sample",
    "use_cache",
    "compiled",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "constraints")
FOR_SAMPLING = ("temperature", "top_p", "typical_p")  # 0 without do_sample is another word for greedy
NUMBERS: dict[str, tuple[type, float, float]] = {  # name -> (type, lowest, highest)
    "max_length": (int, 1, math.inf),
    "max_new_tokens": (int, 0, math.inf),
    "min_length": (int, 0, math.inf),
    "min_new_tokens": (int, 0, math.inf),
    "max_time": (float, 0, math.inf),
    "num_beams": (int, 1, 1e6),
    "num_beam_groups": (int, 1, 1e6),
    "num_return_sequences": (int, 1, 1e6),
    "diversity_penalty": (float, 0, HUGE),
    "length_penalty": (float, -HUGE, HUGE),
    "penalty_alpha": (float, 0, 1),
    "guidance_scale": (float, TINY, HUGE),
    "temperature": (float, TINY, HUGE),
    "top_k": (int, 0, math.inf),
    "top_p": (float, TINY, 1),
    "min_p": (float, 0, 1),
    "typical_p": (float, TINY, 1),
    "epsilon_cutoff": (float, 0, 1),
    "eta_cutoff": (float, 0, 1),
    "repetition_penalty": (float, TINY, HUGE),
    "no_repeat_ngram_size": (int, 0, math.inf),
    "prompt_lookup_num_tokens": (int, 1, math.inf),
    "max_matching_ngram_size": (int, 1, math.inf),
    "num_assistant_tokens": (int, 1, math.inf),
    "assistant_confidence_threshold": (float, 0, 1),
    "prefill_chunk_size": (int, 1, math.inf),
}


# ---- Reading -----------------------------------------------------------------------------------------------


def read_settings(model: nn.Module, config: Any, given: dict) -> tuple[GenerationConfig, dict]:
    """The settings that count, arguments before the folder's generation_config.json, and what of `given` is
    for `forward`. TypeError for unknown names, ValueError for values that cannot be."""
    given = {name: value for name, value in given.items() if name != "logits_to_keep"}  # always the last ones
    stored = stored_settings(model, config)
    forward_names = inspect.signature(model.forward).parameters.keys()
    check_names(given, forward_names - {"input_ids", "labels", "logits_to_keep"})
    arguments = {name: value for name, value in given.items() if name in SETTINGS}
    s = GenerationConfig(**{**stored, **arguments})
    if s.max_new_tokens is None and "max_length" not in stored.keys() | given.keys():
        s.max_length = None  # 20 new ones
    check_kinds(s)
    for name in NUMBERS:
        value = getattr(s, name)
        greedy = not s.do_sample and name in FOR_SAMPLING and isinstance(value, int | float) and value == 0
        if not greedy:
            check_number(name, value)
    for name in ("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty"):
        if getattr(s, name) is None:
            setattr(s, name, 1)
    return s, {name: value for name, value in given.items() if name not in SETTINGS}


def stored_settings(model: nn.Module, config: Any) -> dict:
    """Those of `config`, a GenerationConfig of ours or of Transformers or a dict; None: the checkpoint's."""
    own: Any = model.generation_config if config is None else config
    if hasattr(own, "to_dict"):
        own = own.to_dict()
    elif not isinstance(own, dict | GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig or a dict, not {shown(own)}")
    own = own if isinstance(own, dict) else vars(own)
    return {name: value for name, value in own.items() if name in SETTINGS and value is not None}


def shown(value: Any) -> str:
    """A value in a line of an error."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}" if value.dim() else f"a tensor of {value.item()}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def check_kinds(s: GenerationConfig) -> None:
    """ValueError for values that are of another kind than what is documented; numbers come later."""
    for name in SWITCHES:
        if not isinstance(getattr(s, name), bool | int | None):
            raise ValueError(f"{name} must be True or False, not {shown(getattr(s, name))}")
    for name in LISTS:
        value = getattr(s, name)
        if value is not None and not isinstance(value, list | tuple | set | range):
            raise ValueError(f"{name} must be a list, not {shown(value)}")
    if isinstance(s.early_stopping, Tensor) or isinstance(s.stop_strings, Tensor):
        raise ValueError("early_stopping and stop_strings are no tensors")
    if not isinstance(s.dola_layers, str | list | tuple | None):
        raise ValueError(f"dola_layers must be 'low', 'high' or a list of layers, not {shown(s.dola_layers)}")
    decay = s.exponential_decay_length_penalty
    if decay is not None and not is_pair_of_numbers(decay):
        raise ValueError(
            f"exponential_decay_length_penalty must be (tokens to wait, factor), not {shown(decay)}"
        )


def is_pair_of_numbers(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and all(isinstance(number, int | float) and math.isfinite(number) for number in value)


class UnexpectedArgument(TypeError, ValueError):
    """A TypeError, as of any function; of Transformers' `generate` it is a ValueError."""


def check_names(given: Iterable[str], forward_names: Iterable[str]) -> None:
    known = SETTINGS | set(forward_names)
    for name in sorted(set(given) - known):
        near = [MEANT[name]] if name in MEANT else difflib.get_close_matches(name, known, 1, cutoff=0.85)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise UnexpectedArgument(f"generate() got an unexpected keyword argument {name!r}{hint}")


def check_number(name: str, value: Any) -> None:
    kind, lowest, highest = NUMBERS[name]
    if value is None:
        return
    right_type = isinstance(value, int) or (kind is float and isinstance(value, float))
    if right_type and lowest <= value <= highest:
        return
    bounds = f"from {lowest:g} " + (f"to {highest:g}" if highest < math.inf else "on")
    number = "a whole number" if kind is int else "a number"
    raise ValueError(f"{name} must be {number} {bounds}, not {shown(value)}")
