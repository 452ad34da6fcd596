"""Decoder language models, one readable file each.

    from decoders import gpt_neo, tokenize, weights
    model = weights.load(gpt_neo.GPTNeoForCausalLM, "checkpoints/tiny-gpt-neo")

Importing this package imports nothing heavy.
"""

from decoders.formats.config import FAMILIES, OLD_NAMES, REFUSED, family, model_class, read_config
from decoders.formats.folder import RELEASE, SMALL_FILES, WEIGHT_FILES, check_file, find, read_json

__version__ = "0.1.0"
__all__ = [
    "FAMILIES",
    "OLD_NAMES",
    "REFUSED",
    "RELEASE",
    "SMALL_FILES",
    "WEIGHT_FILES",
    "check_file",
    "family",
    "find",
    "model_class",
    "read_config",
    "read_json",
]
