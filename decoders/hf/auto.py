"""Whichever class a folder wants."""

from pathlib import Path
from typing import Any

from decoders.formats import family, find

from . import heads, models
from .arguments import hub_options
from .configs import CONFIGS, read_known

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForVision2Seq",
    "AutoModelForImageTextToText",
]

CLASSES = {
    name: getattr(module, name)
    for module in (models, heads)
    for name in module.__all__
    if not name.endswith("PreTrainedModel")
}


def known_family(config: dict) -> str:
    """That of a registered class, else the one that the config is of."""
    model_type = config.get("model_type")
    return model_type if model_type in CONFIGS else family(config)


class AutoConfig:
    """The config of a folder, whatever its family."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        hub, kwargs = hub_options(kwargs)
        folder = find(pretrained_model_name_or_path, weights=False, **hub)
        config_class = CONFIGS[known_family(read_known(folder))]
        config = config_class.from_pretrained(pretrained_model_name_or_path, **hub, **kwargs)
        named = config[0] if isinstance(config, tuple) else config  # with what was not used
        named._name_or_path = str(pretrained_model_name_or_path)
        return config

    @staticmethod
    def register(model_type: str, config: type, exist_ok: bool = False) -> None:
        """A config class of one's own, for folders with this `model_type`."""
        if model_type in CONFIGS and not exist_ok:
            known = CONFIGS[model_type].__name__
            raise ValueError(f"{model_type!r} is {known}: give exist_ok=True to replace it")
        CONFIGS[model_type] = config

    @staticmethod
    def for_model(model_type: str, **kwargs: Any) -> Any:
        return CONFIGS[known_family({"model_type": model_type})](**kwargs)


class AutoModel:
    """The class of this kind that the folder's family has: the one without a head, for Fuyu the only one."""

    ends: tuple[str, ...] = ("Model", "ForCausalLM")  # of class names, the first that the family has
    registered: dict[type, type] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.registered = {}

    @classmethod
    def register(cls, config_class: type, model_class: type, exist_ok: bool = False) -> None:
        """A model class of one's own, for this config class."""
        if config_class in cls.registered and not exist_ok:
            raise ValueError(f"{config_class.__name__} has a model already: give exist_ok=True to replace it")
        cls.registered[config_class] = model_class

    @classmethod
    def class_for(cls, config: dict) -> type:
        """ValueError if the family has none of this kind."""
        config_class = CONFIGS[known_family(config)]
        if model_class := cls.registered.get(config_class):
            return model_class
        prefix = config_class.__name__.removesuffix("Config")
        for end in cls.ends:
            if prefix + end in CLASSES:
                return CLASSES[prefix + end]
        there = [name for name, kind in CLASSES.items() if kind.config_class.__name__ == f"{prefix}Config"]
        raise ValueError(f"{cls.__name__}: {prefix} has no such head, only {', '.join(there)}")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Any:
        hub, _ = hub_options(dict(kwargs))
        folder = find(pretrained_model_name_or_path, weights=False, **hub)
        model_class = cls.class_for(read_known(folder))
        return model_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls.class_for(config.to_dict())._from_config(config, **kwargs)


class AutoModelForCausalLM(AutoModel):
    """Next tokens."""

    ends = ("ForCausalLM", "LMHeadModel")


class AutoModelForSequenceClassification(AutoModel):
    """A label for each text."""

    ends = ("ForSequenceClassification",)


class AutoModelForTokenClassification(AutoModel):
    """A label for each token."""

    ends = ("ForTokenClassification",)


class AutoModelForQuestionAnswering(AutoModel):
    """Where an answer starts and ends."""

    ends = ("ForQuestionAnswering",)


class AutoModelForVision2Seq(AutoModel):
    """Fuyu, by an older name of the task."""

    ends = ("ForCausalLM",)


class AutoModelForImageTextToText(AutoModel):
    """Fuyu."""

    ends = ("ForCausalLM",)
