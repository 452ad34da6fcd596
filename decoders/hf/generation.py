"""`generate`, by its documented name and arguments, over `decoders.decoding`."""

import importlib
import inspect
import warnings
from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders import decoding

from .arguments import no_effect
from .caches import (
    Cache,
    DynamicCache,
    cache_class,
    documented_cache,
    grows_in_place,
    is_others,
    others_class,
    plain_cache,
)
from .decoding import WITHOUT_EFFECT, GenerationConfig
from .outputs import GENERATED, GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

__all__ = ["GenerationMixin"]


class GenerationMixin:
    """What a documented model with logits can do besides."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See `decoders.decoding.generate`. `inputs` is `input_ids` (B, T). Without a mask, padding is where
        `pad_token_id` stands, if that is no stop id."""
        ids = input_ids_of(inputs, kwargs)
        check_arguments(generation_config, assistant_model, streamer)
        without_effect({**kwargs, "synced_gpus": synced_gpus})
        kwargs = {name: value for name, value in kwargs.items() if name not in WITHOUT_EFFECT}
        if generation_config is not None and not isinstance(generation_config, dict):
            generation_config = generation_config.to_dict()  # of Transformers
        generation_config = without_negative_ids(generation_config)
        kwargs = as_ours(without_negative_ids(kwargs))
        settings = {**self.generation_config, **(generation_config or {}), **kwargs}
        kwargs |= mask_of_padding(ids, kwargs, settings)
        kwargs |= one_token_at_least(ids, settings)
        past = kwargs.pop("past_key_values", None)
        past = kwargs.pop("cache", past)  # the name of Transformers 5.24
        keep = grows_in_place(past)  # the caller's cache is to hold the text in the end
        if keep:
            kwargs["return_dict_in_generate"] = True
        view = Steps(self, past).view() if is_watched(self) else self.plain
        output = decoding.generate(
            view,
            ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            assistant_model=getattr(assistant_model, "plain", assistant_model),
            streamer=streamer,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            past_key_values=plain_cache(past, cache_class(self)),
            **kwargs,
        )
        if "decoder" in vars(view):  # compiled
            vars(self)["decoder"] = vars(view)["decoder"]
        if isinstance(output, Tensor):
            return output
        new = documented_cache(past, output.past_key_values)
        if keep and not settings.get("return_dict_in_generate"):
            return output.sequences
        return documented_output(output, new)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward` for the ids that `past_key_values` does not hold. `next_sequence_length` is
        how many these are, where the cache holds more than ids: virtual tokens of a tuned prompt."""
        past = kwargs.pop("cache", None)
        past = past_key_values if past is None else past
        inputs = {name: value for name, value in kwargs.items() if name in self.takes and value is not None}
        inputs["use_cache"] = use_cache
        cached = unbranched(past, cache_class(self))
        T, n = input_ids.shape[1], next_sequence_length
        if n is None or len(cached or ()) + n == T:
            given = self.plain.prepare_inputs(input_ids, attention_mask, cached, **inputs)
        else:
            given = {"input_ids": input_ids[:, T - n :], "attention_mask": attention_mask, **inputs}
            given["past_key_values"] = cached
            if attention_mask is not None:
                given["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, T - n :]
        if inputs_embeds is not None and not len(cached or ()):
            given |= {"input_ids": None, "inputs_embeds": inputs_embeds}
        if given["past_key_values"] is not None or past is None or not len(past):
            given["past_key_values"] = past
        return given

    compute_transition_scores = staticmethod(decoding.compute_transition_scores)

    @staticmethod
    def _reorder_cache(past: Any, beam_idx: Tensor) -> tuple:
        return tuple((k[beam_idx], v[beam_idx]) for k, v in past)

    def documented_settings(self, settings: Any) -> GenerationConfig:
        """What `generation_config` is of a model that generates."""
        settings = settings if isinstance(settings, dict) else settings.to_diff_dict()  # of Transformers
        return GenerationConfig(**{**GenerationConfig.from_model_config(self.config), **settings})


# ---- Arguments ---------------------------------------------------------------------------------------------


def input_ids_of(inputs: Any, kwargs: dict) -> Any:
    """Whichever of `inputs` and `input_ids` was given. ValueError for both, or for a text."""
    ids = kwargs.pop("input_ids", None)
    if ids is not None and inputs is not None:
        raise ValueError("inputs and input_ids are the same: give one")
    ids = inputs if ids is None else ids
    if isinstance(ids, str):
        raise ValueError(f"generate takes token ids, not a text: encode {ids[:20]!r} with the tokenizer")
    return ids


def check_arguments(generation_config: Any, assistant_model: Any, streamer: Any) -> None:
    """ValueError for what cannot be what it was given as."""
    if isinstance(generation_config, int | float | str):
        raise ValueError(
            f"the second argument of generate is a GenerationConfig, not {generation_config!r}: "
            f"give max_new_tokens={generation_config!r} by name"
        )
    if assistant_model is not None and not isinstance(assistant_model, nn.Module):
        kind = type(assistant_model).__name__
        raise ValueError(f"assistant_model must be a model of the same vocabulary, not {kind}")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        kind = type(streamer).__name__
        raise ValueError(f"streamer must have put(ids) and end(), as TextStreamer(tokenizer) has, not {kind}")


def without_negative_ids(settings: Any) -> Any:
    """A stop or pad token of -1 is none in Transformers: scripts write that so that nothing stops."""
    if not settings:
        return settings
    changed = {}
    for name in ("eos_token_id", "pad_token_id"):
        value = settings.get(name)
        ids = value.flatten().tolist() if isinstance(value, Tensor) else value
        ids = ids if isinstance(ids, list | tuple) else [ids]
        if any(isinstance(id, int) and id < 0 for id in ids):
            changed[name] = [id for id in ids if id >= 0] or None
    return type(settings)(**{**settings, **changed}) if changed else settings


def as_ours(kwargs: dict) -> dict:
    """With the constraints of Transformers 4 as those of `decoders.decoding`."""
    if not kwargs.get("constraints"):
        return kwargs
    return {**kwargs, "constraints": [*map(own_constraint, kwargs["constraints"])]}


def own_constraint(given: Any) -> Any:
    if hasattr(given, "phrases"):
        return given
    if hasattr(given, "trie"):
        return decoding.DisjunctiveConstraint(phrases_of(given.trie.trie))
    return decoding.PhrasalConstraint(given.token_ids) if hasattr(given, "token_ids") else given


def phrases_of(trie: dict) -> list[list[int]]:
    """All ways through nested dicts of token ids."""
    return [[id, *rest] for id, inner in trie.items() for rest in phrases_of(inner) or [[]]]


def without_effect(given: dict) -> None:
    for name in sorted(WITHOUT_EFFECT & given.keys()):
        if given[name]:
            no_effect(name, "generate works without it")


def mask_of_padding(ids: Any, given: dict, settings: dict) -> dict[str, Tensor]:
    """The mask that padding asks for where none was given."""
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return {}
    pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
    if not isinstance(pad, int):  # what is no id is refused later
        return {}
    eos = eos.flatten().tolist() if isinstance(eos, Tensor) else eos
    stops = pad in (eos if isinstance(eos, list | tuple) else [eos])
    if given.get("attention_mask") is not None or stops or not (ids == pad).any():
        return {}
    return {"attention_mask": (ids != pad).long()}


def one_token_at_least(ids: Any, settings: dict) -> dict[str, int]:
    """As in 4.37, where `max_length` is less than the prompt's."""
    longest, T = settings.get("max_length"), ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else 0
    if settings.get("max_new_tokens") is not None or longest is None or T < longest:
        return {}
    warnings.warn(
        f"max_length {longest} leaves no room after {T} tokens, so there will be one more: "
        "give max_new_tokens",
        stacklevel=3,
    )
    return {"max_new_tokens": 1}


def documented_output(output: Any, cache: Any) -> GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    parts = {name: getattr(output, name) for name in GENERATED}
    parts["past_key_values"] = cache
    of_beams = parts["beam_indices"] is not None
    return (GenerateBeamDecoderOnlyOutput if of_beams else GenerateDecoderOnlyOutput)(**parts)


# ---- Steps that somebody watches ---------------------------------------------------------------------------


def is_watched(model: Any) -> bool:
    """Whether somebody has replaced, or hooked, what `generate` calls once a token."""
    parts = [part for part in model.modules() if hasattr(type(part), "plain_class")]
    hooked = model._forward_hooks or model._forward_pre_hooks
    replaced = any(is_replaced(part) or not is_documented(type(part).forward) for part in parts)
    prepare = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    return bool(hooked) or replaced or prepare or "prepare_inputs_for_generation" in vars(model)


def is_replaced(part: nn.Module) -> bool:
    """Whether somebody set a `forward` on the object, other than the kernels."""
    forward = vars(part).get("forward")
    module = getattr(getattr(forward, "__func__", None), "__globals__", {}).get("__name__", "")
    return forward is not None and not module.startswith("decoders.kernels")


def is_documented(forward: Any) -> bool:
    return getattr(forward, "is_documented", False)


class Steps:
    """A documented model as `decoders.decoding` takes one of ours: each step calls the model's own
    `prepare_inputs_for_generation` and the model itself, whatever these have become."""

    def __init__(self, model: Any, past: Any):
        self.model, self.past, self.virtual = model, past, None
        self.kind, self.handed = cache_class(model), None
        self.output_class = importlib.import_module(model.config_class.plain_class.__module__).CausalLMOutput
        parameters = inspect.signature(model.forward).parameters
        self.open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.takes = {*parameters, *model.takes} if is_documented(type(model).forward) else {*parameters}

    def view(self) -> nn.Module:
        view = self.model.plain
        hooks = {name: OrderedDict() for name in ("_forward_hooks", "_forward_pre_hooks")}
        vars(view).update(hooks, forward=self.forward_under_own_names(), prepare_inputs=self.prepare)
        return view

    def forward_under_own_names(self) -> Any:
        """With the signature from which `decoding` learns what it may pass on."""

        def forward(**given: Any) -> Any:
            return self.forward(given)

        names = {*self.takes, *self.model.takes} - {"self", "args", "kwargs"}
        kind = inspect.Parameter.KEYWORD_ONLY
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in sorted(names)])
        return forward

    def prepare(self, ids: Tensor, mask: Tensor | None, cache: Any, **inputs: Any) -> dict[str, Any]:
        """What the model's own `prepare_inputs_for_generation` gives for the ids that are not cached."""
        first = not len(cache or ())
        n = None
        if self.virtual is not None and not first:
            n = ids.shape[1] - (len(cache) - self.virtual)
        mask = torch.ones_like(ids) if mask is None else mask
        self.cached_before = first
        self.ids_so_far = ids.shape[1]
        given = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=n,
            past_key_values=self.documented(cache),
            attention_mask=mask,
            is_first_iteration=first,
            **{"use_cache": True, **inputs},
        )
        self.handed = given.get("past_key_values")
        own = unbranched(self.handed, self.kind)  # of which decoding asks the length
        return {"input_ids": None, **given, "past_key_values": own}

    def forward(self, given: dict) -> Any:
        """A pass of the model, as one of ours gives it."""
        if self.handed is not None:
            given["past_key_values"] = self.handed
        dropped = {"next_sequence_length", "is_first_iteration", "cache_position"} - {*self.takes}
        given = {name: value for name, value in given.items() if name not in dropped}
        if not self.open:
            given = {name: value for name, value in given.items() if name in self.takes}
        output = self.model(**given, **({"return_dict": True} if "return_dict" in self.takes else {}))
        if isinstance(output, tuple) and not hasattr(output, "logits"):
            raise ValueError(f"{type(self.model).__name__}.forward must give an output with logits")
        parts = {name: getattr(output, name, None) for name in self.output_class._fields}
        cache = parts["past_key_values"]
        parts["past_key_values"] = cache = unbranched(cache, self.kind)
        if self.virtual is None and cache is not None:
            self.virtual = len(cache) - self.ids_so_far
        return self.output_class(**parts)

    def documented(self, cache: Any) -> Any:
        """The cache as the model's own methods know it."""
        if cache is None:
            return self.past
        if isinstance(self.past, DynamicCache):
            self.past.plain = cache
            return self.past
        return documented_cache(self.past, cache)


def unbranched(past: Any, kind: type) -> Any:
    """The family's own cache behind a documented one, with no copy and nothing taken."""
    if isinstance(past, Cache):
        return past.plain
    if is_others(past):
        return others_class(kind)(past)
    return plain_cache(past, kind)
