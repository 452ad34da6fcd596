"""The documented configs: fields and defaults of the readable files, with the documented manners."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from decoders import fuyu, gpt_neo, openai_gpt, persimmon, phi, phi3
from decoders.formats import OWN_NAMES, find, modern, read_config, read_json_if_any, switched

from .arguments import hub_options, nearest, unexpected
from .seen_as import SeenAs

__all__ = [
    "PretrainedConfig",
    "PhiConfig",
    "Phi3Config",
    "PersimmonConfig",
    "FuyuConfig",
    "GPTNeoConfig",
    "OpenAIGPTConfig",
]


class PretrainedConfig(SeenAs):
    """A config of ours that takes the documented arguments, in their order, and keeps what it does not know.
    ValueError, with name and value, for what the models cannot honour."""

    theirs = ("transformers.configuration_utils", "PretrainedConfig")
    plain_class: type
    extras: tuple[str, ...] = ()  # arguments that the documentation does not have: they have no place
    last: tuple[str, ...] = ("bos_token_id", "eos_token_id")  # and those that it has in the end
    attribute_map: dict[str, str] = {}
    keys_to_ignore_at_inference: list[str] = ["past_key_values"]  # a list: Trainer adds to it
    output_attentions, output_hidden_states, return_dict = False, False, True
    is_encoder_decoder, is_composition, architectures, torch_dtype = False, False, None, None
    _name_or_path, attn_implementation, chunk_size_feed_forward = "", None, 0
    has_no_defaults_at_init, pruned_heads = False, None
    base_model_tp_plan = base_model_pp_plan = None  # `decoders.parallel` has plans of its own
    sub_configs: dict[str, type] = {}  # of a config inside this one

    def __init__(self, *args: Any, **kwargs: Any):
        defaults = defaults_of(self)
        given = {**dict(zip(self.positional(), args, strict=False)), **self.by_own_names(kwargs)}
        if hasattr(given.get("text_config"), "to_dict"):
            given["text_config"] = given["text_config"].to_dict()
        replaced = {"attention_types": "attention_layers", "id2label": "num_labels"}
        left_out = {replaced[name] for name in replaced.keys() & given}
        stored = {name: value for name, value in defaults.items() if name not in left_out} | given
        if stored.get("text_config", ...) is None:
            del stored["text_config"]
        current = current_of(stored, self.plain_class)
        vars(self).update(vars(self.plain_class.from_dict(current)))
        if type(vars(self).get("text_config")) is fuyu.PersimmonConfig:
            self.text_config.__class__ = FuyuTextConfig  # a documented config itself
        for key, value in current.items():
            if key not in defaults and key != "model_type":
                setattr(self, key, value)

    def __init_subclass__(cls, **kwargs: Any):
        """Its constructor says which arguments it takes, and in which order."""
        super().__init_subclass__(**kwargs)
        if "plain_class" not in vars(cls):
            if cls.model_type != cls.plain_class.model_type:  # of one's own
                OWN_NAMES[cls.model_type] = cls.plain_class.model_type
            return

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            PretrainedConfig.__init__(self, *args, **kwargs)

        kind, defaults = inspect.Parameter.POSITIONAL_OR_KEYWORD, defaults_of(cls.plain_class)
        names = [*cls.positional(cls.plain_class)]
        names += [name for name in defaults if name not in names]
        parameters = [inspect.Parameter("self", kind)]
        parameters += [inspect.Parameter(name, kind, default=defaults[name]) for name in names]
        parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
        __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        cls.__init__ = __init__

    @classmethod
    def positional(cls, kind: Any = None) -> list[str]:
        """The fields in the documented order of arguments."""
        names = [field.name for field in fields(kind or cls)]
        return [name for name in names if name not in (*EXTRAS, *cls.extras, *cls.last)] + [*cls.last]

    @classmethod
    def by_own_names(cls, given: dict) -> dict:
        """With the names of other models, as `hidden_size` of GPT-1, replaced by the fields'."""
        return {cls.attribute_map.get(name, name): value for name, value in given.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        name = self.attribute_map.get(name, name)
        if name == "id2label" and value is not None:
            value = {int(label_id): label for label_id, label in value.items()}
            vars(self)["num_labels"] = len(value)
        elif name == "num_labels" and len(vars(self).get("id2label") or ()) != value:
            vars(self).pop("id2label", None)
            vars(self).pop("label2id", None)
        if name in ("_attn_implementation", "attn_implementation"):
            name = "attn_implementation"
            if inner := vars(self).get("text_config"):
                inner._attn_implementation = value
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

    @property
    def _attn_implementation(self) -> str:
        """What was asked for, else what Transformers takes by itself. It refuses "sdpa" for two families, and
        trl loads its reference model with what it finds here."""
        own = "eager" if self.plain_class.model_type in ("gpt_neo", "openai-gpt") else "sdpa"
        return self.attn_implementation or own

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
        stored = current_of(read_known(folder), cls.plain_class)
        return cls.of_stored(stored, return_unused_kwargs, **kwargs)

    @classmethod
    def of_stored(cls, stored: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What `config.json` says, with `kwargs` in its place (see `from_pretrained`)."""
        known = {*cls.__dataclass_fields__, *stored, *cls.attribute_map, *OF_ALL_CONFIGS}
        unused = {key: value for key, value in kwargs.items() if key not in known}
        if unused and not return_unused_kwargs:
            unexpected(f"{cls.__name__}.from_pretrained", unused, known)
        given = cls.by_own_names({key: value for key, value in kwargs.items() if key not in unused})
        if "num_labels" in given and given["num_labels"] != stored.get("num_labels"):
            stored = {key: value for key, value in stored.items() if key not in ("id2label", "label2id")}
        config = cls(**{**stored, **given})
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what `config.json` says, the arguments that are not for the hub)."""
        hub, kwargs = hub_options(kwargs)
        return read_config(find(pretrained_model_name_or_path, weights=False, **hub)), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """With `return_unused_kwargs` (config, those of `kwargs` that are no fields of it)."""
        known = {*cls.__dataclass_fields__, *config_dict, *cls.attribute_map, *OF_ALL_CONFIGS}
        unused = {name: value for name, value in kwargs.items() if name not in known}
        if not return_unused_kwargs:
            return cls(**{**config_dict, **kwargs})
        given = {name: value for name, value in kwargs.items() if name in known}
        return cls(**{**config_dict, **given}), unused

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
        others.pop("attn_implementation", None)  # of the program that runs it
        if self._name_or_path:
            others["_name_or_path"] = self._name_or_path
        return {
            key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for key, value in {**others, **own}.items()
        }

    to_diff_dict = to_dict  # every field of a model is written, as its shapes depend on it

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        Path(json_file_path).write_text(self.to_json_string(use_diff), "utf-8")

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self).get("text_config") or self

    @property
    def per_layer_config(self) -> list[Any]:
        """One per layer, for caches of Transformers 5.24. They read `sliding_window`: all layers of Phi-3
        have one. Local layers of GPT-Neo have `window_size`, and their caches hold all keys."""
        return [self] * self.get_text_config().num_hidden_layers

    def update(self, config_dict: dict) -> None:
        for key, value in config_dict.items():
            setattr(self, key, value)

    def __iter__(self) -> Iterator[str]:
        """The names of what it holds."""
        return iter(vars(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def current_of(config: dict, plain_class: Any) -> dict[str, Any]:
    """The fields of today, also of a class of one's own over `plain_class`, with another `model_type`."""
    kind = plain_class.model_type
    return modern({**config, "model_type": kind} if config.get("model_type") in CONFIGS else config, kind)


def read_known(folder: Path) -> dict[str, Any]:
    """`config.json`, also of a registered class with a `model_type` of its own."""
    stored = read_json_if_any(folder / "config.json")
    registered = CONFIGS.get(str(stored.get("model_type")))
    if registered is not None and registered.plain_class.model_type != stored["model_type"]:
        return stored
    return read_config(folder)


def defaults_of(config: Any) -> dict[str, Any]:
    """The default of each field."""
    return {
        field.name: field.default if field.default is not MISSING else field.default_factory()
        for field in fields(config)
    }


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
    "attn_implementation",
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


class FuyuTextConfig(PretrainedConfig, fuyu.PersimmonConfig):
    """Of Fuyu's decoder; of a folder of Fuyu it is a part of the config."""

    plain_class = fuyu.PersimmonConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        hub, others = hub_options(dict(kwargs))
        folder = find(pretrained_model_name_or_path, weights=False, **hub)
        if read_known(folder).get("model_type") != FuyuConfig.model_type:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        inner = current_of(FuyuConfig.from_pretrained(folder).text_config.to_dict(), cls.plain_class)
        return cls.of_stored(inner, *args, **others)


class FuyuConfig(PretrainedConfig, fuyu.FuyuConfig):
    plain_class = fuyu.FuyuConfig
    sub_configs = {"text_config": FuyuTextConfig}
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


CONFIGS = {
    config.model_type: config
    for config in (PhiConfig, Phi3Config, PersimmonConfig, FuyuConfig, GPTNeoConfig, OpenAIGPTConfig)
}
