"""Checks of what `generate` is given as a whole: settings that contradict each other, prompts, lengths."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .settings import Arguments, GenerationConfig, shown


def check_together(s: GenerationConfig, prompts: int, arguments: Arguments) -> None:
    """ValueError for settings that contradict each other."""
    check_beams(s, arguments.streamer)
    check_assisted(s, prompts, arguments.assistant_model)
    check_contrastive(s)
    check_prefill(s)
    check_callables(arguments)
    for name in ("put", "end"):
        if arguments.streamer is not None and not callable(getattr(arguments.streamer, name, None)):
            kind = type(arguments.streamer).__name__
            raise ValueError(f"streamer must have put(ids) and end(), as tokenizer.stream() has, not {kind}")
    if s.stop_strings and arguments.tokenizer is None:
        raise ValueError("stop_strings needs tokenizer=, for the text of the tokens")


def check_callables(arguments: Arguments) -> None:
    for name in ("logits_processor", "stopping_criteria"):
        value = getattr(arguments, name)
        several = isinstance(value, Iterable) and not isinstance(value, str | dict | Tensor)
        if value is not None and not (several and all(map(callable, value))):
            raise ValueError(f"{name} must be a list of functions, not {shown(value)}")
    function = arguments.prefix_allowed_tokens_fn
    if function is not None and not callable(function):
        raise ValueError(f"prefix_allowed_tokens_fn must be a function, not {shown(function)}")
    cache = arguments.past_key_values
    if cache is not None and not hasattr(cache, "truncate"):
        raise ValueError(f"past_key_values must be a KVCache of the model's file, not {shown(cache)}")


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
    prompt = ids if embeds is None else embeds
    if ids is not None and (len(ids) != len(prompt) or ids.shape[1] > prompt.shape[1]):
        message = f"input_ids beside inputs_embeds must be of the same shape {tuple(prompt.shape[:2])}"
        raise ValueError(f"{message}, or of its last tokens, not {tuple(ids.shape)}")
    check_mask("attention_mask", mask, prompt.shape[:2])


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
    if hasattr(ids, "keys"):
        return ": unpack what the tokenizer gave, generate(**inputs)"
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
