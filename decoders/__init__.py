"""Decoder language models, one readable file each.

    from decoders import gpt_neo, tokenize, weights
    model = weights.load(gpt_neo.GPTNeoForCausalLM, "checkpoints/tiny-gpt-neo")

Importing this package imports nothing heavy: what is below comes from `formats` when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .formats import (
        FAMILIES,
        OLD_NAMES,
        REFUSED,
        RELEASE,
        SMALL_FILES,
        WEIGHT_FILES,
        architectures,
        check_file,
        family,
        find,
        read_config,
        read_json,
    )

__version__ = "0.1.0"
__all__ = [
    "FAMILIES",
    "OLD_NAMES",
    "REFUSED",
    "RELEASE",
    "SMALL_FILES",
    "WEIGHT_FILES",
    "architectures",
    "check_file",
    "family",
    "find",
    "model_class",
    "read_config",
    "read_json",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".formats", __name__), name)


def model_class(config: dict[str, Any]) -> Any:
    """The class named in `architectures` if its family has it, else the one that generates text."""
    formats = importlib.import_module(".formats", __name__)
    module_name, default = formats.FAMILIES[formats.family(config)]
    module = importlib.import_module(f".{module_name}", __name__)
    heads = importlib.import_module(".heads", __name__)
    named: Any
    for name in formats.architectures(config):
        named = getattr(module, name, None) or getattr(heads, name, None)
        # a documented class has a config; torch or nn, which the modules import, have none
        if hasattr(named, "config_class") and named.config_class is getattr(module, default).config_class:
            return named
    return getattr(module, default)
