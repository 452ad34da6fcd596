"""The documented tokenizers, over `decoders.tokenize`.

    tokenizer = AutoTokenizer.from_pretrained("microsoft/phi-2")
    tokenizer(["one text", "and another"], padding=True, return_tensors="pt")

`tokenizer.plain` is ours; ids are those of the fast tokenizers, whichever class is asked for.
"""

from pathlib import Path
from typing import Any

from decoders import tokenize
from decoders.formats import find, read_json_if_any

from .arguments import hub_options
from .tokenizer_base import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = [
    "AutoTokenizer",
    "CodeGenTokenizer",
    "CodeGenTokenizerFast",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "OpenAIGPTTokenizer",
    "OpenAIGPTTokenizerFast",
    "PersimmonTokenizer",
    "PersimmonTokenizerFast",
]

# ---- What they are made of ---------------------------------------------------------------------------------


class ByteLevel(PreTrainedTokenizerBase):
    """Byte-level BPE, of `vocab.json` and `merges.txt`."""

    kind = tokenize.ByteLevelTokenizer
    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
    defaults = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        merges_file: str | Path | None = None,
        tokenizer_file: str | Path | None = None,
        bos_token: Any = None,
        eos_token: Any = None,
        unk_token: Any = None,
        **kwargs: Any,
    ):
        files = {"vocab_file": vocab_file, "merges_file": merges_file, "tokenizer_file": tokenizer_file}
        roles = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token}
        super().__init__(files, **roles, **kwargs)


class Pieces(PreTrainedTokenizerBase):
    """SentencePiece, of `tokenizer.model`."""

    kind = tokenize.PieceTokenizer
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    defaults = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        tokenizer_file: str | Path | None = None,
        bos_token: Any = None,
        eos_token: Any = None,
        unk_token: Any = None,
        **kwargs: Any,
    ):
        files = {"vocab_file": vocab_file, "tokenizer_file": tokenizer_file}
        roles = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token}
        super().__init__(files, **roles, **kwargs)


class Words(PreTrainedTokenizerBase):
    """GPT-1's BPE of lower-case words, of `vocab.json` and `merges.txt`."""

    kind = tokenize.WordTokenizer
    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
    defaults = {"unk": "<unk>"}

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        merges_file: str | Path | None = None,
        tokenizer_file: str | Path | None = None,
        unk_token: Any = None,
        **kwargs: Any,
    ):
        files = {"vocab_file": vocab_file, "merges_file": merges_file, "tokenizer_file": tokenizer_file}
        super().__init__(files, unk_token=unk_token, **kwargs)


# ---- By their documented names -----------------------------------------------------------------------------


class GPT2Tokenizer(ByteLevel, PreTrainedTokenizer):
    """Of GPT-Neo."""


class GPT2TokenizerFast(ByteLevel, PreTrainedTokenizerFast):
    """Of GPT-Neo."""


class CodeGenTokenizer(ByteLevel, PreTrainedTokenizer):
    """Of Phi."""


class CodeGenTokenizerFast(ByteLevel, PreTrainedTokenizerFast):
    """Of Phi."""


class LlamaTokenizer(Pieces, PreTrainedTokenizer):
    """Of Phi-3, Persimmon and Fuyu."""


class LlamaTokenizerFast(Pieces, PreTrainedTokenizerFast):
    """Of Phi-3, Persimmon and Fuyu."""


class PersimmonTokenizer(Pieces, PreTrainedTokenizer):
    """As the documentation of Persimmon has it: Transformers has no such class."""


class PersimmonTokenizerFast(Pieces, PreTrainedTokenizerFast):
    """As the documentation of Persimmon has it: Transformers has no such class."""


class OpenAIGPTTokenizer(Words, PreTrainedTokenizer):
    """Of OpenAI GPT."""


class OpenAIGPTTokenizerFast(Words, PreTrainedTokenizerFast):
    """Of OpenAI GPT."""


KINDS = {  # class -> what its folders hold
    "LlamaTokenizer": tokenize.PieceTokenizer,
    "OpenAIGPTTokenizer": tokenize.WordTokenizer,
    "GPT2Tokenizer": tokenize.ByteLevelTokenizer,
    "CodeGenTokenizer": tokenize.ByteLevelTokenizer,
}


class AutoTokenizer:
    """The tokenizer of a folder, whatever its kind."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path, *inputs: Any, use_fast: bool = True, **kwargs: Any
    ) -> PreTrainedTokenizerBase:
        """The class that the folder names, if its vocabulary is of that kind."""
        hub, kwargs = hub_options(kwargs)
        folder = find(pretrained_model_name_or_path, weights=False, **hub)
        plain = tokenize.load(folder)
        named = read_json_if_any(folder / "tokenizer_config.json").get("tokenizer_class") or ""
        name = named.removesuffix("Fast")
        if not isinstance(plain, KINDS.get(name, type(None))):
            name = next(name for name, kind in KINDS.items() if isinstance(plain, kind))
        tokenizer_class = globals()[name + ("Fast" if use_fast else "")]
        return tokenizer_class.over(plain, pretrained_model_name_or_path, kwargs)
