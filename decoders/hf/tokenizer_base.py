"""The documented manners of a tokenizer, over one of `decoders.tokenize`."""

import inspect
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decoders import tokenize
from decoders.formats import TOKENIZER_FILES, find, read_json_if_any, read_text, switched

from .arguments import hub_options, nearest, no_effect, unexpected
from .batching import VERY_LARGE, Batching
from .chat import ChatTemplates
from .encodings import AddedToken, BatchEncoding, content_of, rows_of, tensor_of
from .offsets import located

__all__ = ["PreTrainedTokenizer", "PreTrainedTokenizerBase", "PreTrainedTokenizerFast"]

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
CLEAN = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
COLUMNS = (
    "input_ids",
    "offset_mapping",
    "special_tokens_mask",
    "token_type_ids",
    "attention_mask",
    "overflow_to_sample_mapping",
)  # the first five have a value for each token


def cleaned(text: str) -> str:
    """Without the blanks that GPT-1's words leave before punctuation. It changes code and quotes."""
    for before, after in CLEAN:
        text = text.replace(before, after)
    return text


FITTING = {  # the classes for a folder of each kind
    "PieceTokenizer": "LlamaTokenizer",
    "WordTokenizer": "OpenAIGPTTokenizer",
    "ByteLevelTokenizer": "GPT2Tokenizer or CodeGenTokenizer",
}


class PreTrainedTokenizerBase(Batching, ChatTemplates):
    """The documented manners over a tokenizer of ours."""

    kind: type = tokenize.Tokenizer  # of ours
    defaults: dict[str, str] = {}  # role -> token
    vocab_files_names: dict[str, str] = {}
    model_input_names = ("input_ids", "attention_mask")
    is_fast, pad_token_type_id = False, 0

    def __init__(
        self, files: dict[str, Any] | None = None, *, plain: tokenize.Tokenizer | None = None, **kwargs: Any
    ):
        if plain is None:
            self.own_folder = tempfile.TemporaryDirectory(prefix="decoders-tokenizer-")
            given = {name: file for name, file in (files or {}).items() if file}
            plain = self.from_files(given, Path(self.own_folder.name), kwargs)
        self.plain, self.known = plain, (-1, {}, {})
        config = {**read_json_if_any(plain.folder / "tokenizer_config.json")}
        config |= read_json_if_any(plain.folder / "special_tokens_map.json")
        config |= {name: value for name, value in kwargs.items() if value is not None}
        self.special: dict[str, str] = {}
        for role in ROLES:
            token = config.get(f"{role}_token", self.defaults.get(role))
            if token is not None:
                self.special[role] = content_of(token)
        self.more_special = [content_of(token) for token in config.get("additional_special_tokens") or ()]
        asked = [self.special[role] for role in ROLES if kwargs.get(f"{role}_token") is not None]
        asked += self.more_special if kwargs.get("additional_special_tokens") else []
        plain.add_special_tokens(token for token in asked if token not in plain.added)
        own_left = isinstance(plain, tokenize.PieceTokenizer) and "padding_side" not in config
        self.padding_side = config.get("padding_side") or ("left" if own_left else "right")
        self.truncation_side = config.get("truncation_side") or "right"
        self.model_max_length = int(config.get("model_max_length") or VERY_LARGE)
        words = isinstance(plain, tokenize.WordTokenizer)
        self.clean_up_tokenization_spaces = bool(config.get("clean_up_tokenization_spaces", words))
        self.add_prefix_space = bool(config.get("add_prefix_space"))
        self.split_special_tokens = bool(config.get("split_special_tokens"))
        self.name_or_path = str(kwargs.get("name_or_path", plain.folder))
        self.chat_template = kwargs.get("chat_template") or self.stored_template(config)
        self.init_kwargs = config

    @classmethod
    def from_files(cls, files: dict[str, Any], folder: Path, kwargs: dict) -> tokenize.Tokenizer:
        """A tokenizer of single files, under the names that folders have for them."""
        if not files:
            names = ", ".join(cls.vocab_files_names)
            raise ValueError(f"{cls.__name__} takes {names}, or use from_pretrained")
        for name, file in files.items():
            target = cls.vocab_files_names.get(name, "tokenizer.json")
            shutil.copyfile(file, folder / target)
        named = {f"{role}_token": kwargs.get(f"{role}_token", cls.defaults.get(role)) for role in ROLES}
        roles = {name: content_of(token) for name, token in named.items() if token is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(roles))
        return tokenize.load(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *inputs: Any, **kwargs: Any) -> Any:
        hub, kwargs = hub_options(kwargs)
        plain = tokenize.load(find(pretrained_model_name_or_path, weights=False, **hub))
        if not isinstance(plain, cls.kind):
            fitting = FITTING[type(plain).__name__]
            raise ValueError(f"{plain.folder} holds no {cls.__name__}: use {fitting}, or AutoTokenizer")
        return cls.over(plain, pretrained_model_name_or_path, kwargs)

    @classmethod
    def over(cls, plain: tokenize.Tokenizer, path_or_id: str | Path, kwargs: dict) -> Any:
        if kwargs.pop("trust_remote_code", False):
            no_effect("trust_remote_code", "no code of a checkpoint is ever run")
        for name in ("use_fast", "legacy", "from_slow", "tokenizer_type", "tokenizer_file"):
            kwargs.pop(name, None)
        return cls(plain=plain, name_or_path=path_or_id, **kwargs)

    def stored_template(self, config: dict) -> str | None:
        file = self.plain.folder / "chat_template.jinja"
        found = read_text(file) if file.exists() else config.get("chat_template")
        if isinstance(found, list):
            named = {one["name"]: one["template"] for one in found}
            found = named.get("default", next(iter(named.values()), None))
        return found

    # ---- Tokens by role, by name, by id ----

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "special" not in vars(self):
            raise AttributeError(name)
        role, _, end = name.partition("_token")
        if role in ROLES and end == "":
            return self.special.get(role)
        if role in ROLES and end == "_id":
            return None if role not in self.special else self.convert_tokens_to_ids(self.special[role])
        raise AttributeError(f"{type(self).__name__} has no {name!r}{nearest(name, dir(self))}")

    def __setattr__(self, name: str, value: Any) -> None:
        role, _, end = name.partition("_token")
        if end == "_id" and role in ROLES and value is not None:
            value = self.convert_ids_to_tokens(value)
        if role not in ROLES or end not in ("", "_id"):
            super().__setattr__(name, value)
        elif value is None:
            self.special.pop(role, None)
        else:
            self.special[role] = content_of(value)

    @property
    def additional_special_tokens(self) -> list[str]:
        return self.more_special

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[Any]) -> None:
        self.more_special = [content_of(token) for token in tokens]

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        found = {f"{role}_token": token for role, token in self.special.items()}
        return {**found, **({"additional_special_tokens": self.more_special} if self.more_special else {})}

    all_special_tokens = property(
        lambda self: list(dict.fromkeys([*self.special.values(), *self.more_special]))
    )
    all_special_ids = property(lambda self: [self.convert_tokens_to_ids(t) for t in self.all_special_tokens])
    vocab_size = property(lambda self: self.plain.vocab_size)
    added_tokens_encoder = property(lambda self: {t.content: t.id for t in self.plain.added.values()})
    added_tokens_decoder = property(
        lambda self: {
            t.id: AddedToken(t.content, t.single_word, t.lstrip, t.rstrip, t.normalized, t.special)
            for t in sorted(self.plain.added.values())
        }
    )

    def __len__(self) -> int:
        return len(self.plain)

    def names(self) -> tuple[dict[int, str], dict[str, int]]:
        """The token of each id, and the id of each token, as vocabulary files write them; made once, and anew
        when a token was added."""
        plain = self.plain
        if self.known[0] != len(plain.added):
            letters = {byte: letter for letter, byte in tokenize.byte_letters().items()}
            in_bytes, added = isinstance(plain, tokenize.ByteLevelTokenizer), self.added_tokens_decoder
            tokens = {
                id: "".join(map(letters.get, text)) if in_bytes and id not in added else text.decode()
                for id, text in plain.bytes_of.items()
            }
            ids = {token: id for id, token in reversed(tokens.items())}  # of several the first
            self.known = len(plain.added), tokens, {**ids, **self.added_tokens_encoder}
        return self.known[1:]

    def token_id(self, token: str) -> int | None:
        return self.names()[1].get(token)

    def token_of(self, id: int) -> str | None:
        return self.names()[0].get(int(id))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if tokens is None:
            return None
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.token_id(tokens)
        unknown = self.special.get("unk")
        return self.token_id(unknown) if found is None and unknown is not None else found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        if isinstance(ids, int):
            return self.token_of(ids)
        hidden = set(self.all_special_ids) if skip_special_tokens else ()
        return [self.token_of(int(id)) for id in ids if int(id) not in hidden]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.plain.decode(self.convert_tokens_to_ids(tokens))

    def get_vocab(self) -> dict[str, int]:
        return {token: id for id, token in self.names()[0].items()}

    vocab = property(get_vocab)
    get_added_vocab = added_tokens_encoder.fget

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs
    ) -> list[str]:
        return self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens=add_special_tokens))

    def add_special_tokens(
        self, special_tokens_dict: dict[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Example: {"cls_token": "[CLS]"}. How many are new; the model's table must grow to `len(self)`."""
        names = {*(f"{role}_token" for role in ROLES), "additional_special_tokens"}
        unexpected("add_special_tokens", special_tokens_dict.keys() - names, names)
        new = 0
        for name, value in special_tokens_dict.items():
            several = name == "additional_special_tokens"
            new += self.add_tokens(value if several else [value], special_tokens=True)
            kept = [] if replace_additional_special_tokens else self.more_special
            setattr(self, name, [*kept, *value] if several else value)
        return new

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """How many were no added tokens before; a piece of the vocabulary keeps its id. Plain words are found
        in normalized text, special ones in the text as it is, an AddedToken as it says."""
        tokens = [new_tokens] if isinstance(new_tokens, str) or hasattr(new_tokens, "content") else new_tokens
        return sum(self.add_one(token, special_tokens) for token in tokens)

    def add_one(self, token: Any, special: bool) -> bool:
        special = special or getattr(token, "special", False) is True
        if isinstance(token, str):
            return bool(token) and self.plain.add_token(token, special, normalized=not special)
        names = ("lstrip", "rstrip", "single_word", "normalized")
        flags = {name: getattr(token, name, False) is True for name in names}
        return self.plain.add_token(token.content, special, **flags)

    # ---- Texts to ids ----

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        return self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def tokens_of(
        self, text: Any, words: bool, places: bool, split: bool
    ) -> list[tuple[int, tuple[int, int], int]]:
        """(id, (begin, end) in the text, 0) of each token of a text, of one in words, or of ids as they are;
        places only where they are asked for."""
        if words:
            return [token for word in self.spaced(text) for token in self.of_word(*word, places, split)]
        if isinstance(text, list | tuple):
            if places:
                raise ValueError("return_offsets_mapping needs texts: ids have no place in one")
            ids = [id if isinstance(id, int) else self.convert_tokens_to_ids(id) for id in text]
            return [(id, (0, 0), 0) for id in ids]
        add = self.add_prefix_space and text and not text[0].isspace()
        return self.of_word(" " + text if add else text, int(bool(add)), places, split)

    def spaced(self, words: Sequence[str]) -> list[tuple[str, int]]:
        """Each word as it is encoded, and how many letters were put before it."""
        if not isinstance(self.plain, tokenize.ByteLevelTokenizer):
            return [(word, 0) for word in words]
        if not self.add_prefix_space:
            raise ValueError(
                "words need the space before them: load the tokenizer with add_prefix_space=True"
            )
        return [(" " + word, 0) for word in words]

    def of_word(
        self, text: str, before: int, places: bool, split: bool
    ) -> list[tuple[int, tuple[int, int], int]]:
        """Tokens of one text; places count from after the `before` letters that were put there."""
        if not places and not split:
            return [(id, (0, 0), 0) for id in self.plain.encode(text, add_special_tokens=False)]
        tokens = located(self.plain, text, split)
        return [(id, (max(0, begin - before), max(0, end - before)), 0) for id, (begin, end) in tokens]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list:
        before = list(self.plain.prefix_ids)
        return [*before, *token_ids_0, *([] if token_ids_1 is None else [*before, *token_ids_1])]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list, token_ids_1: list | None = None
    ) -> list[int]:
        n = len(self.plain.prefix_ids)
        return [0] * (n + len(token_ids_0)) + ([] if token_ids_1 is None else [1] * (n + len(token_ids_1)))

    def get_special_tokens_mask(
        self, token_ids_0: list, token_ids_1: list | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return [int(id in self.all_special_ids) for id in token_ids_0]
        before = [1] * len(self.plain.prefix_ids)
        first = [*before, *(0 for _ in token_ids_0)]
        return first if token_ids_1 is None else [*first, *before, *(0 for _ in token_ids_1)]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return len(self.plain.prefix_ids) * (2 if pair else 1)

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        """`input_ids` and `attention_mask` of a text, of a list of them, of pairs. As lists, or with
        `return_tensors` "pt" or "np" as (B, T). With `return_overflowing_tokens` what was cut off comes as
        further rows, which begin with the last `stride` tokens of the row before."""
        split = kwargs.pop("split_special_tokens", None)
        split = self.split_special_tokens if split is None else bool(split)
        self.check_call(kwargs)
        rows, batched = rows_of(text, text_pair, is_split_into_words)
        limit, padded = self.limit_of(truncation, max_length, padding), padding not in (False, "do_not_pad")
        if limit is not None and padded and pad_to_multiple_of and limit % pad_to_multiple_of:
            told = f"rows cut to {limit} tokens"
            raise ValueError(f"{told} cannot be padded to a multiple of {pad_to_multiple_of}")
        found: dict[str, list] = {name: [] for name in COLUMNS}
        begin = [(id, (0, 0), 1) for id in self.plain.prefix_ids] if add_special_tokens else []
        for i, row in enumerate(rows):
            a, b = (
                None
                if one is None
                else self.tokens_of(one, is_split_into_words, return_offsets_mapping, split)
                for one in row
            )
            pieces = [(a, b)]
            if limit is not None:
                room = limit - len(begin) * (1 if b is None else 2)
                pieces = self.windows(a, b, room, truncation, stride if return_overflowing_tokens else None)
            for first, second in pieces:
                tokens = [(*token, 0, 1) for token in (*begin, *first)]
                tokens += [] if second is None else [(*token, 1, 1) for token in (*begin, *second)]
                for k, name in enumerate(COLUMNS[:5]):
                    found[name].append([token[k] for token in tokens])
                found["overflow_to_sample_mapping"].append(i)
        wanted = {
            "token_type_ids": return_token_type_ids,
            "special_tokens_mask": return_special_tokens_mask,
            "attention_mask": return_attention_mask is None or return_attention_mask,
            "offset_mapping": return_offsets_mapping,
            "overflow_to_sample_mapping": return_overflowing_tokens,
        }
        found = {name: column for name, column in found.items() if wanted.get(name, True)}
        found = self.padded(found, padding, max_length, pad_to_multiple_of, padding_side)
        if return_length:
            found["length"] = [len(row) for row in found["input_ids"]]
        if return_tensors is None and not batched and not return_overflowing_tokens:
            return BatchEncoding(
                {name: column if name == "length" else column[0] for name, column in found.items()}
            )
        return BatchEncoding({name: tensor_of(name, rows, return_tensors) for name, rows in found.items()})

    def check_call(self, kwargs: dict) -> None:
        for name in ("text_target", "text_pair_target"):
            if kwargs.pop(name, None) is not None:
                told = "is for models with an encoder"
                raise ValueError(f"{name} {told}: give the target to another call as text")
        unexpected(f"{type(self).__name__}()", kwargs, inspect.signature(type(self).__call__).parameters)

    batch_encode_plus = encode_plus = lambda self, *args, **kwargs: self(*args, **kwargs)

    # ---- Ids to texts ----

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and isinstance(ids[0], list):
            return self.batch_decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        if skip_special_tokens:
            hidden = set(self.all_special_ids)
            ids = [id for id in ids if id not in hidden]
        text = self.plain.decode(ids, skip_special_tokens)
        asked = clean_up_tokenization_spaces
        return cleaned(text) if (self.clean_up_tokenization_spaces if asked is None else asked) else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> list[str]:
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences]

    # ---- Files ----

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        folder = Path(save_directory)
        with switched(folder) as new:
            self.plain.write(new)
            config = {
                **read_json_if_any(new / "tokenizer_config.json"),
                **self.special_tokens_map,
                "padding_side": self.padding_side,
                "model_max_length": self.model_max_length,
                "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            }
            config.setdefault("tokenizer_class", type(self).__name__.removesuffix("Fast"))
            if self.chat_template and not (new / "chat_template.jinja").exists():
                config["chat_template"] = self.chat_template
            files = {"tokenizer_config.json": config, "special_tokens_map.json": self.special_tokens_map}
            for name, content in files.items():
                (new / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return tuple(str(folder / name) for name in TOKENIZER_FILES if (folder / name).exists())

    def save_vocabulary(
        self, save_directory: str | Path, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Only the vocabulary: paths of its files."""
        names = [name for name in self.vocab_files_names.values() if (self.plain.folder / name).exists()]
        if not names:
            raise ValueError(
                f"{self.plain.folder} has none of {', '.join(self.vocab_files_names.values())}: "
                "save_pretrained writes what it has"
            )
        if not Path(save_directory).is_dir():
            raise NotADirectoryError(f"{save_directory} is no folder: make it first")
        targets = [
            Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
            for name in names
        ]
        for name, target in zip(names, targets, strict=True):
            if (self.plain.folder / name).resolve() != target.resolve():
                shutil.copyfile(self.plain.folder / name, target)
        return tuple(map(str, targets))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"padding_side={self.padding_side!r}, special_tokens={self.special_tokens_map})"
        )


class PreTrainedTokenizer(PreTrainedTokenizerBase):
    """Ids are the same as of the `...Fast` one of the same name."""


class PreTrainedTokenizerFast(PreTrainedTokenizerBase):
    """The class for which `is_fast` is true."""

    is_fast = True
