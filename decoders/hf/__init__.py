"""The documented Transformers API over the six files: change the import, keep the script.

    from decoders.hf import AutoModelForCausalLM, AutoTokenizer

docs/api.md says, name by name, what is as in which version of Transformers, and what differs and why.
"""

from typing import Any

from . import models
from .models import *  # noqa: F403


def __getattr__(name: str) -> Any:
    return getattr(models, name)
