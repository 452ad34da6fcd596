"""Whichever class a folder wants."""

from pathlib import Path
from typing import Any

from decoders.formats import family, find, read_config

from . import heads, models
from .arguments import hub_options
from .configs import CONFIGS

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


class AutoConfig:
    """The config of a folder, whatever its family."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        hub, kwargs = hub_options(kwargs)
        folder = find(pretrained_model_name_or_path, weights=False, **hub)
        config_class = CONFIGS[family(read_config(folder))]
        return config_class.from_pretrained(pretrained_model_name_or_path, **hub, **kwargs)

    @staticmethod
    def for_model(model_type: str, **kwargs: Any) -> Any:
        return CONFIGS[family({"model_type": model_type})](**kwargs)


class AutoModel:
    """The class of this kind that the folder's family has: the one without a head, for Fuyu the only one."""

    ends: tuple[str, ...] = ("Model", "ForCausalLM")  # of class names, the first that the family has

    @classmethod
    def class_for(cls, config: dict) -> type:
        """ValueError if the family has none of this kind."""
        prefix = CONFIGS[family(config)].__name__.removesuffix("Config")
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
        model_class = cls.class_for(read_config(folder))
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
