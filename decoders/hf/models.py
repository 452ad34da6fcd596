"""The documented Transformers API over the six files: change the import, keep the script.

    from .models import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("microsoft/phi-2")
    tokenizer = AutoTokenizer.from_pretrained("microsoft/phi-2")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=20))[0])

Nothing here computes a model. Each class adds manners to one of ours, and `model.plain` is that one, with the
same weights; `tokenizer.plain` is the tokenizer of `decoders.tokenize`. docs/api.md says, name by name, what
is as in which version of Transformers, and what differs and why.
"""

import copy
import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders import decoding, fuyu, gpt_neo, openai_gpt, persimmon, phi, phi3, weights
from decoders.formats.config import family, modern, read_config
from decoders.formats.folder import find
from decoders.formats.switch import switched

from .decoding import *  # noqa: F403
from .decoding import WITHOUT_EFFECT, GenerationConfig
from .fuyu import *  # noqa: F403
from .outputs import *  # noqa: F403
from .outputs import (
    GENERATED,
    Cache,
    DynamicCache,
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    ModelOutput,
    OpenAIGPTDoubleHeadsModelOutput,
    branched,
)
from .text import *  # noqa: F403
from .text import hub_options, nearest, no_effect, unexpected

# ---- Configs -----------------------------------------------------------------------------------------------


class PretrainedConfig:
    """A config of ours that takes the documented arguments, in their order, and keeps what it does not know.
    ValueError, with name and value, for what the models cannot honour."""

    plain_class: type
    extras: tuple[str, ...] = ()  # arguments that the documentation does not have: they have no place
    last: tuple[str, ...] = ("bos_token_id", "eos_token_id")  # and those that it has in the end
    attribute_map: dict[str, str] = {}
    keys_to_ignore_at_inference: list[str] = ["past_key_values"]  # a list: Trainer adds to it
    output_attentions, output_hidden_states, return_dict = False, False, True
    is_encoder_decoder, is_composition, architectures, torch_dtype = False, False, None, None
    _name_or_path, _attn_implementation = "", "sdpa"

    def __init__(self, *args: Any, **kwargs: Any):
        defaults = {
            field.name: field.default if field.default is not MISSING else field.default_factory()
            for field in fields(self)
        }
        names = [name for name in defaults if name not in (*EXTRAS, *self.extras, *self.last)] + [*self.last]
        given = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        given = {**dict(zip(names, args, strict=False)), **given}
        derived = {"attention_types": "attention_layers", "id2label": "num_labels"}
        left_out = {derived[name] for name in derived.keys() & given}
        if hasattr(given.get("text_config"), "to_dict"):
            given["text_config"] = given["text_config"].to_dict()
        whole = {name: value for name, value in defaults.items() if name not in left_out}
        current = modern(
            {
                key: value
                for key, value in {**whole, **given}.items()
                if key != "text_config" or value is not None
            },
            self.model_type,
        )
        vars(self).update(vars(self.plain_class.from_dict(current)))
        for key, value in current.items():
            if key not in defaults and key != "model_type":
                setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        name = self.attribute_map.get(name, name)
        if name == "id2label" and value is not None:
            value = {int(id): label for id, label in value.items()}
            vars(self)["num_labels"] = len(value)
        elif name == "num_labels" and len(vars(self).get("id2label") or ()) != value:
            vars(self).pop("id2label", None)
            vars(self).pop("label2id", None)
        vars(self)[name] = value

    def __getattr__(self, name: str) -> Any:
        if name in self.attribute_map:
            return getattr(self, self.attribute_map[name])
        if name == "id2label":
            return {i: f"LABEL_{i}" for i in range(self.num_labels)}
        if name == "label2id":
            return {label: i for i, label in self.id2label.items()}
        inner = vars(self).get("text_config")
        if inner is not None and hasattr(inner, name):
            return getattr(inner, name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}{nearest(name, vars(self))}")

    use_return_dict = property(lambda self: self.return_dict)
    name_or_path = property(lambda self: self._name_or_path)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Of a folder or hub id. `kwargs` that are no fields of it are an error, or with
        `return_unused_kwargs` come back."""
        hub, kwargs = hub_options(kwargs)
        folder = find(pretrained_model_name_or_path, weights=False, **hub)
        stored = modern(read_config(folder), cls.model_type)
        known = {*cls.__dataclass_fields__, *stored, *cls.attribute_map, *OF_ALL_CONFIGS}
        unused = {key: value for key, value in kwargs.items() if key not in known}
        if unused and not return_unused_kwargs:
            unexpected(f"{cls.__name__}.from_pretrained", unused, known)
        given = {cls.attribute_map.get(key, key): value for key, value in kwargs.items() if key not in unused}
        if "num_labels" in given and given["num_labels"] != stored.get("num_labels"):
            stored = {key: value for key, value in stored.items() if key not in ("id2label", "label2id")}
        config = cls(**{**stored, **given})
        config._name_or_path = str(pretrained_model_name_or_path)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
        return cls(**{**config_dict, **kwargs})

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Any:
        return cls.from_dict(json.loads(Path(json_file).read_text("utf-8")))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        with switched(Path(save_directory)) as new:
            (new / "config.json").write_text(self.to_json_string(), "utf-8")

    def to_dict(self) -> dict[str, Any]:
        own = self.plain_class.to_dict(self)
        known = {*own, *type(self).__dataclass_fields__}  # of which it may leave some out
        others = {key: value for key, value in vars(self).items() if key not in known and key[0] != "_"}
        if self._name_or_path:
            others["_name_or_path"] = self._name_or_path
        return {
            key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for key, value in {**others, **own}.items()
        }

    to_diff_dict = to_dict  # every field of a model is written, as its shapes depend on it

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self).get("text_config") or self

    def update(self, config_dict: dict) -> None:
        for key, value in config_dict.items():
            setattr(self, key, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


EXTRAS = ("num_labels", "problem_type", "pad_token_id")
OF_ALL_CONFIGS = (
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "torch_dtype",
    "architectures",
    "pruned_heads",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "use_cache",
)


class PhiConfig(PretrainedConfig, phi.PhiConfig):
    plain_class = phi.PhiConfig
    extras = ("classifier_dropout", "hidden_dropout")


class Phi3Config(PretrainedConfig, phi3.Phi3Config):
    plain_class = phi3.Phi3Config
    extras = ("classifier_dropout", "hidden_dropout", "head_dim", "rope_per_row")
    last = ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window")


class PersimmonConfig(PretrainedConfig, persimmon.PersimmonConfig):
    plain_class = persimmon.PersimmonConfig
    extras = ("classifier_dropout",)
    last = ("pad_token_id", "bos_token_id", "eos_token_id")


class FuyuConfig(PretrainedConfig, fuyu.FuyuConfig):
    plain_class = fuyu.FuyuConfig
    extras = ("image_token_id",)
    last = ("pad_token_id", "bos_token_id", "eos_token_id", "text_config")


class GPTNeoConfig(PretrainedConfig, gpt_neo.GPTNeoConfig):
    plain_class = gpt_neo.GPTNeoConfig
    extras = ("attention_layers", "tie_word_embeddings")
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}


class OpenAIGPTConfig(PretrainedConfig, openai_gpt.OpenAIGPTConfig):
    plain_class = openai_gpt.OpenAIGPTConfig
    extras = ("summary_last_dropout", "use_cache", "tie_word_embeddings")
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }


# ---- Models ------------------------------------------------------------------------------------------------


class SeenAs:
    """To `isinstance`, which asks for the class as well as for the type, of a kind of Transformers' too where
    that is loaded. Its Trainer saves of other models the tensors alone, without a config, and peft adapts
    no other turned matrices."""

    theirs: tuple[str, str]  # module and class

    @property
    def __class__(self) -> type:
        kind = getattr(sys.modules.get(self.theirs[0]), self.theirs[1], None)
        return both(type(self), kind) if kind else type(self)


@cache
def both(own: type, theirs: type) -> type:
    return type(own.__name__, (own, theirs), {"__module__": own.__module__, "__doc__": own.__doc__})


class Conv1D(SeenAs, openai_gpt.Conv1D):
    theirs = ("transformers.pytorch_utils", "Conv1D")


class Documented(SeenAs):
    """The manners that the documentation gives every model, over a class of ours."""

    theirs = ("transformers.modeling_utils", "PreTrainedModel")
    plain_class: type
    config_class: type
    takes: tuple[str, ...]  # documented arguments of forward, in their order
    gives: tuple[str, ...]  # fields of the output
    never_cached: bool  # unless somebody asks: GPT-1's documentation knows no cache
    main_input_name, framework, is_parallelizable, warnings_issued = "input_ids", "pt", False, {}
    _keys_to_ignore_on_save, _tied_weights_keys = None, None
    supports_gradient_checkpointing = True

    def __init__(self, config: Any):
        if not isinstance(config, PretrainedConfig):
            told = f"a {self.config_class.__name__}, not {type(config).__name__}"
            raise TypeError(f"{type(self).__name__} takes {told}")
        super().__init__(config)
        self.name_or_path = config._name_or_path
        for part in self.modules():
            if type(part) is openai_gpt.Conv1D:
                part.__class__ = Conv1D
        for layer, heads in (getattr(config, "pruned_heads", None) or {}).items():
            prune(self, int(layer), heads)
        set_attention(self, config._attn_implementation)

    @property
    def plain(self) -> nn.Module:
        """The model of the readable file: the same parameters, and its own `forward` and `generate`."""
        view = self.plain_class.__new__(self.plain_class)
        vars(view).update(vars(self))
        vars(view).pop("forward", None)  # somebody's hook, which knows the documented output
        own = next(kind for kind in type(self).__mro__ if "plain_class" in vars(kind))
        if type(self).forward is not own.forward:  # a subclass has another pass
            view.forward = self.overridden
        return view

    def overridden(self, **given: Any) -> Any:
        """A subclass's pass, as `generate` takes ours."""
        output = self.forward(**given, return_dict=True)
        kind = importlib.import_module(self.plain_class.__module__).CausalLMOutput
        found = kind(*(output.get(name) for name in kind._fields))
        past = found.past_key_values
        return found._replace(past_key_values=past.plain) if isinstance(past, Cache) else found

    # ---- A pass ----

    def documented_pass(self, args: tuple, given: dict) -> ModelOutput | tuple:
        if len(args) > len(self.takes):
            raise TypeError(f"forward takes {len(self.takes)} arguments, not {len(args)}")
        given = {**dict(zip(self.takes, args, strict=False)), **given}
        if unknown := given.keys() - {*self.takes}:
            unexpected(f"{type(self).__name__}.forward", unknown, self.takes)
        config, return_dict = self.config, given.pop("return_dict", None)
        if given.pop("cache_position", None) is not None:
            no_effect("cache_position", "positions follow from the cache and from position_ids")
        for name in ("output_attentions", "output_hidden_states"):
            given[name] = getattr(config, name) if given.get(name) is None else given[name]
        if given.get("use_cache") is None and self.never_cached:
            given["use_cache"] = False
        past = given.pop("past_key_values", None)
        if past is not None:
            given["past_key_values"] = branched(past)
        found = self.plain_class.forward(self, **given)._asdict()
        if (cache := found.get("past_key_values")) is not None:
            found["past_key_values"] = Cache.of(cache)
            if isinstance(past, DynamicCache):
                past.past, found["past_key_values"] = found["past_key_values"], past
        found = self.output_class(**{name: found[name] for name in self.gives if name in found})
        return_dict = config.use_return_dict if return_dict is None else return_dict
        return found if return_dict else found.to_tuple()

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

    # ---- From a folder, and back ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        torch_dtype: Any = None,
        dtype: Any = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model of a folder or hub id, in `eval()`, in float32 unless `torch_dtype` (or `dtype`) says
        otherwise: "auto" is as stored. Other arguments are fields of the config, or the hub's."""
        hub, kwargs = hub_options(kwargs)
        for name in sorted(LOADING_WITHOUT_EFFECT.keys() & kwargs):
            if kwargs.pop(name):
                no_effect(name, LOADING_WITHOUT_EFFECT[name])
        if kwargs.pop("use_flash_attention_2", False):
            attn_implementation = "flash_attention_2"
        redraw, asked = kwargs.pop("ignore_mismatched_sizes", False), dtype_of(torch_dtype, dtype)
        folder = find(pretrained_model_name_or_path, **hub)
        config = cls.config_for(folder, config, kwargs)
        config._name_or_path = str(pretrained_model_name_or_path)
        config._attn_implementation = attn_implementation or config._attn_implementation
        return cls.loaded(folder, config, asked, device_map, redraw, output_loading_info)

    @classmethod
    def loaded(
        cls, folder: Path, config: Any, dtype: torch.dtype | None, device_map: Any, redraw: bool, info: bool
    ) -> Any:
        """The model; with `info` also what was missing, not used, or with `redraw` of another size."""
        own = {field.name: getattr(config, field.name) for field in fields(config)}
        if hasattr(config, "text_config"):
            own["text_config"] = asdict(config.text_config)
        labels = stored_labels(folder) if redraw else None
        mismatched = labels is not None and labels != own["num_labels"]
        own |= {"num_labels": labels} if mismatched else {}
        parts = device_map if isinstance(device_map, dict) and len({*device_map.values()}) > 1 else None
        device = "cpu" if parts else one_device(device_map)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            model = weights.load(cls, folder, dtype=dtype, device=device, **own)
        vars(model.config).update({key: value for key, value in vars(config).items() if key != "text_config"})
        model.name_or_path, model.config.torch_dtype = config._name_or_path, model.dtype
        changed = new_labels(model, config.num_labels) if mismatched else []
        set_attention(model, config._attn_implementation)
        if device_map is not None:
            model.hf_device_map = {"": device}
        model = dispatched(model, parts) if parts else model
        if not info:
            return model
        matched = weights.match(*weights.fitting(cls, folder, **own))
        return model, {
            "missing_keys": matched.new,
            "unexpected_keys": matched.unused,
            "mismatched_keys": changed,
            "error_msgs": [],
        }

    @classmethod
    def config_for(cls, folder: Path, given: Any, changes: dict) -> Any:
        """The folder's config, or a copy of the one that was given, with what else was asked for."""
        if given is None or isinstance(given, str | Path):
            return cls.config_class.from_pretrained(folder if given is None else given, **changes)
        config = copy.deepcopy(given)
        config.update(changes)
        return config

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """See `weights.save`. `max_shard_size` in bytes, or as "200MB"."""
        if push_to_hub:
            raise ValueError("push_to_hub is not offered: save, then `hf upload NAME FOLDER`")
        if not safe_serialization:
            no_effect("safe_serialization=False", "what is written is safetensors")
        model = self
        if state_dict is not None:  # of somebody who has gathered the weights
            with torch.device("meta"):
                model = type(self)(self.config)
            model.load_state_dict(state_dict, strict=False, assign=True)
            model.tie_weights()
            model.config_json, model.generation_config = self.config_json, self.generation_config
        if is_main_process:
            weights.save(model, save_directory, max_shard_bytes=bytes_of(max_shard_size))

    @classmethod
    def _from_config(
        cls,
        config: Any,
        torch_dtype: Any = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A new model, in the dtype that is asked for, else the config's, else float32."""
        if torch_dtype is None and dtype is None:
            dtype = config.torch_dtype
        model = cls(config).to(dtype_of(torch_dtype, dtype) or torch.float32)
        return set_attention(model, attn_implementation or config._attn_implementation)

    # ---- Parts and numbers ----

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Of a tied output layer under both names, as Transformers' own; ours has the table's alone."""
        state, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        if self.tied_to and self.lm_head.weight is self.get_submodule(self.tied_to).weight:
            state[f"{prefix}lm_head.weight"] = state[f"{prefix}{self.tied_to}.weight"]
        return state

    device = property(lambda self: next(self.parameters()).device)
    dtype = property(lambda self: next(p.dtype for p in self.parameters() if p.is_floating_point()))
    _no_split_modules = property(
        lambda self: sorted(
            {type(part[0]).__name__ for part in self.modules() if isinstance(part, nn.ModuleList)}
        )
    )
    base_model_prefix = property(lambda self: weights.LAYOUTS[self.config.model_type].prefix)
    base_model = property(lambda self: getattr(self, self.base_model_prefix, self))
    is_gradient_checkpointing = is_activation_checkpointing = property(
        lambda self: any(getattr(part, "gradient_checkpointing", False) for part in self.modules())
    )

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.table_name())

    def table_name(self) -> str:
        return next(name for name, part in self.named_modules() if isinstance(part, nn.Embedding))

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.set_submodule(self.table_name(), value)
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Module | None:
        return next((part.lm_head for part in self.modules() if hasattr(part, "lm_head")), None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        next(part for part in self.modules() if hasattr(part, "lm_head")).lm_head = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Returns the token table. New rows are the mean of the old ones."""
        n = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        n = n if pad_to_multiple_of is None else -(-n // pad_to_multiple_of) * pad_to_multiple_of
        weights.resize_embeddings(self, n)
        return self.get_input_embeddings()

    def prune_heads(self, heads_to_prune: dict[int, list[int]]) -> None:
        """Take heads out of layers; a mask that is 0 for them gives the same numbers, more slowly."""
        for layer, heads in heads_to_prune.items():
            prune(self, layer, heads)
        before = getattr(self.config, "pruned_heads", None) or {}
        gone = {int(layer): {*heads} for layer, heads in before.items()}
        for layer, heads in heads_to_prune.items():
            gone[layer] = gone.get(layer, set()) | {*heads}
        self.config.pruned_heads = {layer: sorted(heads) for layer, heads in gone.items()}

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        tables = {id(part.weight) for part in self.modules() if isinstance(part, nn.Embedding)}
        left_out = tables if exclude_embeddings else ()
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if id(p) not in left_out)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        return sum(part.nbytes for part in (*self.parameters(), *(self.buffers() if return_buffers else ())))

    def gradient_checkpointing_disable(self) -> None:
        for part in self.modules():
            part.gradient_checkpointing = False

    def enable_input_require_grads(self) -> None:
        """So that adapters learn where all else is frozen."""
        table = self.get_input_embeddings()
        table.register_forward_hook(lambda part, given, output: output.requires_grad_(True))

    def set_attn_implementation(self, attn_implementation: str) -> None:
        set_attention(self, attn_implementation)

    can_generate = classmethod(lambda cls: hasattr(cls.plain_class, "generate"))

    @classmethod
    def is_custom_code(cls) -> bool:
        """True: peft then takes the names of modules as they are, and none of a newer Transformers'."""
        return True

    def post_init(self) -> None:
        """A model of ours has its weights when it is made."""

    def _init_weights(self, module: nn.Module) -> None:
        self.init_weights(module)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Tags of a model card, which is not written here."""


PreTrainedModel = Documented  # as scripts ask for it

LOADING_WITHOUT_EFFECT = {
    "trust_remote_code": "no code of a checkpoint is ever run",
    **dict.fromkeys(
        (
            "low_cpu_mem_usage",
            "_fast_init",
            "use_safetensors",
            "weights_only",
            "offload_folder",
            "offload_state_dict",
            "offload_buffers",
            "max_memory",
            "variant",
        ),
        "files are mapped into memory, of whatever format they are",
    ),
    **dict.fromkeys(("from_tf", "from_flax"), "the files tell what they are"),
}


def dtype_of(torch_dtype: Any, dtype: Any) -> torch.dtype | None:
    """None for "auto". ValueError if the two names of the argument contradict each other."""
    if torch_dtype is not None and dtype is not None and dtype_of(torch_dtype, None) != dtype_of(None, dtype):
        raise ValueError(f"torch_dtype {torch_dtype} and dtype {dtype} are the same argument: give one")
    asked = dtype if torch_dtype is None else torch_dtype
    if isinstance(asked, str) and asked != "auto":
        asked = getattr(torch, asked.removeprefix("torch."), asked)
    if asked not in (None, "auto") and not isinstance(asked, torch.dtype):
        told = f"not {torch_dtype or dtype!r}"
        raise ValueError(f"torch_dtype must be a torch.dtype, its name or 'auto', {told}")
    return None if asked == "auto" else torch.float32 if asked is None else asked


HEADS = ("score", "classifier", "qa_outputs")  # whose rows are labels


def stored_labels(folder: Path) -> int | None:
    """How many labels the checkpoint's own head has."""
    names = {f"{head}.weight" for head in HEADS}
    return next((len(tensor) for name, tensor in weights.tensors(folder).items() if name in names), None)


def new_labels(model: nn.Module, n: int) -> list[str]:
    """A head of n labels in place of the checkpoint's, drawn anew. Returns the names of its parameters."""
    name = next(name for name in HEADS if hasattr(model, name))
    old = getattr(model, name)
    more = {"device": old.weight.device, "dtype": old.weight.dtype}
    setattr(model, name, nn.Linear(old.in_features, n, old.bias is not None, **more))
    model.init_weights(getattr(model, name))
    model.config.num_labels = n
    names = [f"{name}.{part}" for part, _ in getattr(model, name).named_parameters()]
    told = f"{', '.join(names)} have {n} labels, the checkpoint's {old.out_features}"
    warnings.warn(f"{told}: drawn anew, train them before use", stacklevel=3)
    return names


def one_device(device_map: Any) -> Any:
    device = next(iter(device_map.values())) if isinstance(device_map, dict) else device_map
    if device in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device is None else device


def dispatched(model: nn.Module, device_map: dict) -> nn.Module:
    try:
        from accelerate import dispatch_model
    except ImportError:
        told = "a device_map of several devices needs accelerate: pip install accelerate"
        raise ImportError(told) from None
    return dispatch_model(model, device_map)


def bytes_of(size: int | str) -> int:
    """Example: "200MB" -> 200,000,000."""
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10}
    text = str(size).upper().strip()
    unit = next((unit for unit in units if text.endswith(unit)), "")
    try:
        return int(float(text.removesuffix(unit)) * units.get(unit, 1))
    except ValueError:
        raise ValueError(f"max_shard_size must be bytes, or as '5GB', not {size!r}") from None


def cache_class(model: nn.Module) -> type:
    return importlib.import_module(model.plain_class.__module__).KVCache


def attentions_of(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if hasattr(type(part), "attend")]


def prune(model: nn.Module, layer: int, heads: Sequence[int]) -> None:
    """Cut the heads with these numbers, of the unpruned model, out of q, k, v and what reads them."""
    part = attentions_of(model)[layer]
    joint, projections = hasattr(part, "c_attn"), [getattr(part, f"{letter}_proj", None) for letter in "qkv"]
    if model.config.model_type not in ("gpt_neo", "openai-gpt"):
        told = f"heads of {type(model).__name__} cannot be pruned"
        raise NotImplementedError(f"{told}: no version of Transformers does it either")
    out = part.c_proj if joint else part.out_proj
    n = (out.weight.shape[0] if joint else out.weight.shape[1]) // part.head_dim
    known = getattr(part, "heads", [*range(n)])
    kept = [place for place, head in enumerate(known) if head not in heads]
    if not kept or not {*heads} <= {*range(model.config.num_attention_heads)}:
        raise ValueError(f"layer {layer} has the heads {known}: {sorted(heads)} cannot be pruned")
    device = out.weight.device
    inside = torch.arange(part.head_dim, device=device)
    rows = (torch.tensor(kept, device=device)[:, None] * part.head_dim + inside).flatten()
    if joint:
        of_each = torch.cat([rows, rows + n * part.head_dim, rows + 2 * n * part.head_dim])
        changes = [(part.c_attn, "weight", (slice(None), of_each)), (part.c_attn, "bias", of_each)]
        changes.append((out, "weight", rows))
    else:
        changes = [(proj, name, rows) for proj in projections for name, _ in proj.named_parameters()]
        changes.append((out, "weight", (slice(None), rows)))
    for module, name, index in changes:
        old = getattr(module, name)
        setattr(module, name, nn.Parameter(old.data[index].clone(), old.requires_grad))
    for proj in () if joint else projections:
        proj.out_features = len(rows)
    if not joint:
        out.in_features = len(rows)
    part.heads = [known[place] for place in kept]


def eager(
    attend: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    whole: bool = False,
    head_mask: Tensor | None = None,
) -> tuple:
    """The formula, also where nobody wants to see the weights."""
    T, S = q.shape[2], k.shape[2]
    if bias is None and T > 1:
        bias = torch.full((T, S), float("-inf"), dtype=q.dtype, device=q.device).triu(S - T + 1)
    y, found = attend(q, k, v, bias, scale, dropout, True, head_mask)
    return y, found if whole else None


def set_attention(model: nn.Module, kind: str | None) -> nn.Module:
    """ "sdpa": PyTorch's kernels, and ours; "eager": the formula; "flash_attention_2": as PyTorch has it."""
    kind = kind or "sdpa"
    if kind == "flash_attention_2":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
            told = "needs an NVIDIA GPU of compute capability 8.0 or more, and there is none"
            raise ValueError(
                f"attn_implementation='flash_attention_2' {told}: leave it out, the default is "
                "the fastest here"
            )
    elif kind not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation must be 'sdpa', 'eager' or 'flash_attention_2', not {kind!r}")
    for part in attentions_of(model):
        if kind == "eager":
            part.attend = partial(eager, type(part).attend)
        elif isinstance(vars(part).get("attend"), partial) and part.attend.func is eager:
            del part.attend
    model.config._attn_implementation = kind
    return model


def documented(
    base: type,
    config: type,
    last: str = "return_dict",
    without: tuple[str, ...] = (),
    output: type = ModelOutput,
) -> type:
    """Our class with the documented manners. `last` are the arguments that it has besides, before those that
    the documentation does not have; `without` the fields of its output that the documentation does not."""
    own = inspect.signature(base.forward)
    extras = {"past_key_values", "use_cache"} if config is OpenAIGPTConfig else set()
    names = [name for name in own.parameters if name not in {*extras, "logits_to_keep", "self"}]
    names += [*last.split(), *(name for name in own.parameters if name in {*extras, "logits_to_keep"})]

    def forward(self, *args, **kwargs):
        return self.documented_pass(args, kwargs)

    forward.__doc__ = base.forward.__doc__
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(
        [inspect.Parameter("self", kind), *(inspect.Parameter(name, kind, default=None) for name in names)]
    )
    gives = tuple(name for name in own.return_annotation._fields if name not in without)
    content = {
        "config_class": config,
        "plain_class": base,
        "takes": tuple(names),
        "gives": gives,
        "output_class": output,
        "never_cached": bool(extras),
        "forward": forward,
        "__doc__": base.__doc__,
        "__module__": __name__,
    }
    return type(base.__name__, (Documented, base), content)


NO_CACHE = ("past_key_values",)
OF_PHI3 = "return_dict cache_position"
PhiModel = documented(phi.PhiModel, PhiConfig)
PhiForCausalLM = documented(phi.PhiForCausalLM, PhiConfig)
PhiForSequenceClassification = documented(phi.PhiForSequenceClassification, PhiConfig)
PhiForTokenClassification = documented(phi.PhiForTokenClassification, PhiConfig, without=NO_CACHE)
Phi3Model = documented(phi3.Phi3Model, Phi3Config, OF_PHI3)
Phi3ForCausalLM = documented(phi3.Phi3ForCausalLM, Phi3Config, OF_PHI3)
Phi3ForSequenceClassification = documented(phi3.Phi3ForSequenceClassification, Phi3Config, OF_PHI3)
Phi3ForTokenClassification = documented(phi3.Phi3ForTokenClassification, Phi3Config, without=NO_CACHE)
PersimmonModel = documented(persimmon.PersimmonModel, PersimmonConfig)
PersimmonForCausalLM = documented(persimmon.PersimmonForCausalLM, PersimmonConfig)
PersimmonForSequenceClassification = documented(persimmon.PersimmonForSequenceClassification, PersimmonConfig)
PersimmonForTokenClassification = documented(
    persimmon.PersimmonForTokenClassification, PersimmonConfig, without=NO_CACHE
)
FuyuForCausalLM = documented(fuyu.FuyuForCausalLM, FuyuConfig)
GPTNeoModel = documented(gpt_neo.GPTNeoModel, GPTNeoConfig)
GPTNeoForCausalLM = documented(gpt_neo.GPTNeoForCausalLM, GPTNeoConfig)
GPTNeoForQuestionAnswering = documented(gpt_neo.GPTNeoForQuestionAnswering, GPTNeoConfig)
GPTNeoForSequenceClassification = documented(gpt_neo.GPTNeoForSequenceClassification, GPTNeoConfig)
GPTNeoForTokenClassification = documented(
    gpt_neo.GPTNeoForTokenClassification, GPTNeoConfig, without=NO_CACHE
)
OpenAIGPTModel = documented(openai_gpt.OpenAIGPTModel, OpenAIGPTConfig)
OpenAIGPTLMHeadModel = documented(openai_gpt.OpenAIGPTLMHeadModel, OpenAIGPTConfig)
OpenAIGPTDoubleHeadsModel = documented(
    openai_gpt.OpenAIGPTDoubleHeadsModel, OpenAIGPTConfig, output=OpenAIGPTDoubleHeadsModelOutput
)
OpenAIGPTForSequenceClassification = documented(
    openai_gpt.OpenAIGPTForSequenceClassification, OpenAIGPTConfig
)

# ---- Whichever class a folder wants ------------------------------------------------------------------------

CONFIGS = {
    config.model_type: config
    for config in (PhiConfig, Phi3Config, PersimmonConfig, FuyuConfig, GPTNeoConfig, OpenAIGPTConfig)
}


class AutoConfig:
    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        hub, kwargs = hub_options(kwargs)
        folder = find(pretrained_model_name_or_path, weights=False, **hub)
        found = CONFIGS[family(read_config(folder))]
        return found.from_pretrained(pretrained_model_name_or_path, **hub, **kwargs)

    @staticmethod
    def for_model(model_type: str, **kwargs: Any) -> Any:
        return CONFIGS[family({"model_type": model_type})](**kwargs)


class Auto:
    """The class of this kind that the folder's family has."""

    ends: tuple[str, ...]  # of class names, the first that the family has

    @classmethod
    def class_for(cls, config: dict) -> type:
        kind = family(config)
        prefix = CONFIGS[kind].__name__.removesuffix("Config")
        names = [prefix + end for end in cls.ends if prefix + end in globals()]
        if not names:
            raise ValueError(
                f"{cls.__name__}: {prefix} has no such head, only "
                + ", ".join(
                    name
                    for name, value in globals().items()
                    if isinstance(value, type)
                    and issubclass(value, Documented)
                    and value is not Documented
                    and value.config_class is CONFIGS[kind]
                )
            )
        return globals()[names[0]]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Any:
        hub, _ = hub_options(dict(kwargs))
        folder = find(pretrained_model_name_or_path, weights=False, **hub)
        found = cls.class_for(read_config(folder))
        return found.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls.class_for(config.to_dict())._from_config(config, **kwargs)


def auto(name: str, *ends: str) -> type:
    return type(name, (Auto,), {"ends": ends, "__module__": __name__})


AutoModel = auto("AutoModel", "Model", "ForCausalLM")
AutoModelForCausalLM = auto("AutoModelForCausalLM", "ForCausalLM", "LMHeadModel")
AutoModelForSequenceClassification = auto("AutoModelForSequenceClassification", "ForSequenceClassification")
AutoModelForTokenClassification = auto("AutoModelForTokenClassification", "ForTokenClassification")
AutoModelForQuestionAnswering = auto("AutoModelForQuestionAnswering", "ForQuestionAnswering")
AutoModelForVision2Seq = auto("AutoModelForVision2Seq", "ForCausalLM")
AutoModelForImageTextToText = auto("AutoModelForImageTextToText", "ForCausalLM")


def __getattr__(name: str) -> Any:
    if name == "pipeline":
        from .pipelines import pipeline

        return pipeline
    for prefix, file in (("TF", "tf_model.h5"), ("Flax", "flax_model.msgpack")):
        if isinstance(globals().get(name.removeprefix(prefix)), type):
            raise ImportError(
                f"{name} needs no other framework here: these two lines read {file} as well\n"
                f"    from .models import {name.removeprefix(prefix)}\n"
                f"    model = {name.removeprefix(prefix)}.from_pretrained(FOLDER)"
            )
    raise AttributeError(f"decoders.hf.models has no {name!r}{nearest(name, globals())}")
