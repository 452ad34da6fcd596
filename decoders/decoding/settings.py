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
    for name in NUMBERS:
        if s.do_sample or name not in FOR_SAMPLING or getattr(s, name) != 0:
            check_number(name, getattr(s, name))
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
        raise ValueError(f"generation_config must be a GenerationConfig or a dict, not {own!r}")
    own = own if isinstance(own, dict) else vars(own)
    return {name: value for name, value in own.items() if name in SETTINGS and value is not None}


def check_names(given: Iterable[str], forward_names: Iterable[str]) -> None:
    known = SETTINGS | set(forward_names)
    for name in sorted(set(given) - known):
        near = [MEANT[name]] if name in MEANT else difflib.get_close_matches(name, known, 1, cutoff=0.85)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"generate() got an unexpected keyword argument {name!r}{hint}")


def check_number(name: str, value: Any) -> None:
    kind, lowest, highest = NUMBERS[name]
    if value is None:
        return
    right_type = isinstance(value, int) or (kind is float and isinstance(value, float))
    if right_type and lowest <= value <= highest:
        return
    bounds = f"from {lowest:g} " + (f"to {highest:g}" if highest < math.inf else "on")
    number = "a whole number" if kind is int else "a number"
    raise ValueError(f"{name} must be {number} {bounds}, not {value!r}")


# ---- Checks ------------------------------------------------------------------------------------------------


def check_together(s: GenerationConfig, prompts: int, arguments: Arguments) -> None:
    """ValueError for settings that contradict each other."""
    check_beams(s, arguments.streamer)
    check_assisted(s, prompts, arguments.assistant_model)
    check_contrastive(s)
    check_prefill(s)
    for name in ("put", "end"):
        if arguments.streamer is not None and not callable(getattr(arguments.streamer, name, None)):
            kind = type(arguments.streamer).__name__
            raise ValueError(f"streamer must have put(ids) and end(), as tokenizer.stream() has, not {kind}")
    if s.stop_strings and arguments.tokenizer is None:
        raise ValueError("stop_strings needs tokenizer=, for the text of the tokens")


def check_beams(s: GenerationConfig, streamer: Any) -> None:
    N, groups, wanted = s.num_beams, s.num_beam_groups, s.num_return_sequences
    if N > 1 and streamer is not None:
        raise ValueError("beams change their text to the end: a streamer needs num_beams=1")
    if N % groups:
        raise ValueError(f"num_beam_groups {groups} does not divide num_beams {N}")
    if 1 < N < wanted:
        raise ValueError(f"num_return_sequences {wanted} is more than num_beams {N}")
    if N == 1 and wanted > 1 and not s.do_sample:
        raise ValueError(f"num_return_sequences {wanted} needs do_sample=True or num_beams")
    if groups > 1 and s.do_sample:
        raise ValueError("num_beam_groups has no do_sample: a penalty parts them")
    if groups == 1 and s.diversity_penalty:
        raise ValueError("diversity_penalty needs num_beam_groups above 1")
    if s.early_stopping not in (True, False, None, "never"):
        raise ValueError("early_stopping must be True, False or 'never'")


def check_assisted(s: GenerationConfig, prompts: int, assistant: Any) -> None:
    lookup = s.prompt_lookup_num_tokens is not None
    if s.num_assistant_tokens_schedule not in (None, "constant", "heuristic", "heuristic_transient"):
        raise ValueError("num_assistant_tokens_schedule must be 'constant' or 'heuristic'")
    if assistant is None and not lookup:
        return
    if s.num_beams > 1 or s.contrastive or s.dola_layers or s.guided:
        raise ValueError(
            "assisted decoding is greedy or plain sampling: no beams, contrastive search, DoLa, guidance"
        )
    if prompts * s.num_return_sequences > 1:
        raise ValueError(f"assisted decoding follows one text, not {prompts * s.num_return_sequences}")
    if assistant is not None and lookup:
        raise ValueError("give assistant_model or prompt_lookup_num_tokens, not both")


def check_contrastive(s: GenerationConfig) -> None:
    if not s.contrastive:
        return
    if s.num_beams > 1 or s.do_sample:
        raise ValueError("penalty_alpha (contrastive search) has no beams and no do_sample")
    if (s.top_k or 0) < 2:
        raise ValueError("penalty_alpha (contrastive search) needs top_k of 2 or more")
    if s.guided:
        raise ValueError("penalty_alpha and guidance_scale do not go together")
    if not s.use_cache:
        raise ValueError("penalty_alpha (contrastive search) needs use_cache")


def check_prefill(s: GenerationConfig) -> None:
    if not s.prefill_chunk_size:
        return
    if not s.use_cache:
        raise ValueError("prefill_chunk_size needs use_cache")
    if s.output_attentions or s.output_hidden_states or s.dola_layers:
        raise ValueError(
            "prefill_chunk_size keeps nothing of a prompt's layers: no attentions, hidden states, DoLa"
        )


def check_prompt(ids: Any, mask: Any, embeds: Any = None) -> None:
    """ValueError for shapes that are no batch of prompts."""
    if embeds is not None and not is_batch(embeds, 3):
        raise ValueError(f"inputs_embeds must be a tensor (batch, tokens, width), not {described(embeds)}")
    if ids is not None and not is_batch(ids, 2):
        message = "input_ids must be a tensor (batch, tokens), one token at least"
        raise ValueError(f"{message}, not {described(ids)}{way_out(ids)}")
    if ids is not None and embeds is not None and ids.shape != embeds.shape[:2]:
        message = f"input_ids beside inputs_embeds must be of the same shape {tuple(embeds.shape[:2])}"
        raise ValueError(f"{message}, not {tuple(ids.shape)}")
    check_mask("attention_mask", mask, (embeds if ids is None else ids).shape[:2])


def check_mask(name: str, mask: Any, shape: Sequence[int]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != shape or ((mask != 0) & (mask != 1)).any():
        wrong = "" if isinstance(mask, Tensor) else f", not {type(mask).__name__}"
        if isinstance(mask, int):
            wrong += f": a number of tokens is max_new_tokens={mask}"
        raise ValueError(f"{name} must be a tensor {tuple(shape)}, 0 at padding and 1 elsewhere{wrong}")


def way_out(ids: Any) -> str:
    """What makes a batch of prompts of it."""
    if isinstance(ids, str):
        return ": torch.tensor([tokenizer.encode(text)]) is one"
    if isinstance(ids, list):
        return ": torch.tensor([ids]) is one"
    if isinstance(ids, Tensor) and ids.dim() == 1 and len(ids):
        return ": ids[None] is one"
    return ""


def is_batch(value: Any, dims: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == dims and value.shape[1] > 0


def described(value: Any) -> str:
    """The shape of a tensor, the type of anything else."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def new_tokens_limit(model: Any, s: GenerationConfig, T: int) -> int:
    """How many new ids there may be after T. ValueError for none, or more than the model can read."""
    positions: int | float = getattr(model, "max_positions", math.inf)
    unread = 0 if s.contrastive else 1  # the last new token is not fed, but by contrastive search
    if s.max_new_tokens is not None:
        limit = s.max_new_tokens
    elif s.max_length is None:
        limit = int(min(20, positions - T + unread))
    else:
        limit = s.max_length - T
        if limit <= 0:
            raise ValueError(f"max_length {s.max_length} leaves no room after a prompt of {T} tokens")
    if T + limit - unread > positions:
        raise ValueError(f"{T} prompt + {limit} new tokens do not fit into {positions} positions")
    if (s.min_new_tokens or 0) > limit or (s.min_length or 0) > T + limit:
        raise ValueError(f"min_length, min_new_tokens ask for more than the {limit} new tokens that may come")
    return limit
