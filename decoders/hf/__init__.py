"""The documented Transformers API over the six files: change the import, keep the script.

    from decoders.hf import AutoModelForCausalLM, AutoTokenizer

Nothing here computes a model. Each class adds manners to one of ours, and `model.plain` is that one, with the
same weights; `tokenizer.plain` is the tokenizer of `decoders.tokenize`. docs/api.md says, name by name, what
is as in which version of Transformers, and what differs and why.
"""

from typing import Any

from .attention import *  # noqa: F403
from .auto import *  # noqa: F403
from .caches import *  # noqa: F403
from .configs import *  # noqa: F403
from .decoding import *  # noqa: F403
from .encodings import *  # noqa: F403
from .fuyu import *  # noqa: F403
from .generation import *  # noqa: F403
from .heads import *  # noqa: F403
from .models import *  # noqa: F403
from .outputs import *  # noqa: F403
from .pipelines import *  # noqa: F403
from .pretrained import *  # noqa: F403
from .tokenizer_base import *  # noqa: F403
from .tokenizers import *  # noqa: F403


def __getattr__(name: str) -> Any:
    from .elsewhere import missing

    return missing(name, globals())
