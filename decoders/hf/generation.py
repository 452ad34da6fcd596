"""`generate`, by its documented name and arguments, over `decoders.decoding`."""

import importlib
import warnings
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders import decoding

from .arguments import no_effect
from .decoding import WITHOUT_EFFECT, GenerationConfig
from .outputs import (
    GENERATED,
    Cache,
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    branched,
)

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
        """See `tools.decoding.generate`. `inputs` is `input_ids` (B, T). Without a mask, padding is where
        `pad_token_id` stands, if that is no stop id."""
        ids = kwargs.pop("input_ids", None)
        if ids is not None and inputs is not None:
            raise ValueError("inputs and input_ids are the same: give one")
        ids = inputs if ids is None else ids
        kwargs["synced_gpus"] = synced_gpus
        for name in sorted(WITHOUT_EFFECT & kwargs.keys()):
            if kwargs.pop(name):
                no_effect(name, "generate works without it")
        if generation_config is not None and not isinstance(generation_config, dict):
            generation_config = generation_config.to_dict()  # of Transformers
        settings = {**self.generation_config, **(generation_config or {}), **kwargs}
        pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
        stops = pad is None or pad in (eos if isinstance(eos, list | tuple) else [eos])
        unmasked = kwargs.get("attention_mask") is None and isinstance(ids, Tensor)
        if unmasked and not stops and (ids == pad).any():
            kwargs["attention_mask"] = (ids != pad).long()
        if (past := branched(kwargs.pop("past_key_values", None))) is not None:
            kwargs["past_key_values"] = past if hasattr(past, "lengths") else cache_class(self)(past)
        longest, T = settings.get("max_length"), 0 if ids is None else ids.shape[1]
        if settings.get("max_new_tokens") is None and longest is not None and T >= longest:
            warnings.warn(
                f"max_length {longest} leaves no room after {T} tokens, so there will be one more: "
                "give max_new_tokens",
                stacklevel=2,
            )
            kwargs["max_new_tokens"] = 1  # as 4.37
        assistant = getattr(assistant_model, "plain", assistant_model)
        view = self.plain
        found = decoding.generate(
            view,
            ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            assistant_model=assistant,
            streamer=streamer,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            **kwargs,
        )
        vars(self).update({name: vars(view)[name] for name in ("decoder",) if name in vars(view)})  # compiled
        if isinstance(found, Tensor):
            return found
        parts = {name: getattr(found, name) for name in GENERATED}
        if parts["past_key_values"] is not None:
            parts["past_key_values"] = Cache.of(parts["past_key_values"])
        of_beams = parts["beam_indices"] is not None
        return (GenerateBeamDecoderOnlyOutput if of_beams else GenerateDecoderOnlyOutput)(**parts)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        past = branched(past_key_values)
        past = past if past is None or hasattr(past, "lengths") else cache_class(self)(past)
        inputs = {name: value for name, value in kwargs.items() if name in self.takes and value is not None}
        inputs["use_cache"] = use_cache
        given = self.plain.prepare_inputs(input_ids, attention_mask, past, **inputs)
        if inputs_embeds is not None and past is None:
            given |= {"input_ids": None, "inputs_embeds": inputs_embeds}
        return {**given, "past_key_values": past_key_values}

    compute_transition_scores = staticmethod(decoding.compute_transition_scores)
    _reorder_cache = staticmethod(lambda past, beam_idx: tuple((k[beam_idx], v[beam_idx]) for k, v in past))

    @property
    def generation_config(self) -> GenerationConfig:
        return vars(self)["generation_config"]

    @generation_config.setter
    def generation_config(self, settings: dict) -> None:
        given = {**GenerationConfig.from_model_config(self.config), **settings}
        vars(self)["generation_config"] = GenerationConfig(**given)


def cache_class(model: nn.Module) -> type:
    return importlib.import_module(model.plain_class.__module__).KVCache
