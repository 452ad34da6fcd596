"""The documented manners of a tokenizer, over one of `decoders.tokenize`."""

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decoders import tokenize
from decoders.formats import find, read_json_if_any, read_text

from .arguments import check_single, hub_options, nearest, no_effect, unexpected
from .batching import VERY_LARGE, Batching
from .chat import ChatTemplates
from .encodings import AddedToken, BatchEncoding, Encoding, content_of, has_texts, rows_of, tensor_of
from .offsets import located
from .seen_as import SeenAs, blank
from .tokenizer_files import ROLES, TokenizerFiles

__all__ = ["PreTrainedTokenizer", "PreTrainedTokenizerBase", "PreTrainedTokenizerFast"]

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
    "word_ids",
    "token_type_ids",
    "attention_mask",
    "overflow_to_sample_mapping",
)  # the first six have a value for each token


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


class PreTrainedTokenizerBase(SeenAs, Batching, ChatTemplates, TokenizerFiles):
    """The documented manners over a tokenizer of ours."""

    theirs = ("transformers", "PreTrainedTokenizerBase")
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

    def stored_template(self, config: dict) -> str | dict[str, str] | None:
        """A template, or several by their names."""
        file = self.plain.folder / "chat_template.jinja"
        stored = read_text(file) if file.exists() else config.get("chat_template")
        if isinstance(stored, list):
            stored = {one["name"]: one["template"] for one in stored}
        others = sorted((self.plain.folder / "additional_chat_templates").glob("*.jinja"))
        if others and isinstance(stored, str):
            stored = {"default": stored, **{file.stem: read_text(file) for file in others}}
        return stored

    # ---- Copies ----

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """By the files: what encodes is compiled code of other libraries."""
        with tempfile.TemporaryDirectory() as folder:
            self.plain.write(Path(folder))
            files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        left_out = ("plain", "own_folder", "known")
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        return restored, (type(self), files, state)

    # ---- Tokens by role, by name, by id ----

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "special" not in vars(self):
            raise AttributeError(name)
        role, _, end = name.partition("_token")
        if role in ROLES and end == "":
            return self.special.get(role)
        if role in ROLES and end == "_id":
            return None if role not in self.special else self.convert_tokens_to_ids(self.special[role])
        known = [*vars(self), *dir(type(self))]  # dir(self) would have Transformers' names too
        raise AttributeError(f"{type(self).__name__} has no {name!r}{nearest(name, known)}")

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

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return [self.convert_tokens_to_ids(token) for token in self.more_special]

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
    ) -> list[tuple[int, tuple[int, int], int, int | None]]:
        """(id, (begin, end) in the text, 0, word) of each token of a text, of one in words, or of ids as they
        are; places only where they are asked for."""
        if words:
            self.check_words()
            return [
                (id, span, 0, i)
                for i, word in enumerate(text)
                for id, span, _ in self.of_text(word, places, split)
            ]
        if isinstance(text, list | tuple):
            if places:
                raise ValueError("return_offsets_mapping needs texts: ids have no place in one")
            ids = [id if isinstance(id, int) else self.convert_tokens_to_ids(id) for id in text]
            return [(id, (0, 0), 0, 0) for id in ids]
        return [(id, span, 0, word) for id, span, word in self.of_text(text, places, split)]

    def check_words(self) -> None:
        if isinstance(self.plain, tokenize.ByteLevelTokenizer) and not self.add_prefix_space:
            raise ValueError(
                "words need the space before them: load the tokenizer with add_prefix_space=True"
            )

    def of_text(self, text: str, places: bool, split: bool) -> list[tuple[int, tuple[int, int], int]]:
        """(id, place, number of the word) of a text, or of one word. Places and words only with `places`."""
        if self.add_prefix_space:
            return self.with_spaces(text, split)
        if not places and not split:
            return [(id, (0, 0), 0) for id in self.plain.encode(text, add_special_tokens=False)]
        return located(self.plain, text, split)

    def with_spaces(self, text: str, split: bool) -> list[tuple[int, tuple[int, int], int]]:
        """With the space that `add_prefix_space` puts before each part between added tokens, and that has no
        place in the text."""
        tokens: list[tuple[int, tuple[int, int], int]] = []
        for start, part, _, is_added in self.plain.segments(text, split):
            n = int(not is_added and part[0] != " ")
            first = tokens[-1][2] + 1 if tokens else 0
            tokens += [
                (id, (start + max(begin - n, 0), start + end - n), first + word)
                for id, (begin, end), word in located(self.plain, " " * n + part, split)
            ]
        return tokens

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
        check_single({**locals(), "text": None, "text_pair": None})
        split = kwargs.pop("split_special_tokens", None)
        split = self.split_special_tokens if split is None else bool(split)
        self.check_call(kwargs)
        rows, batched = rows_of(text, text_pair, is_split_into_words)
        limit, padded = self.limit_of(truncation, max_length, padding), padding not in (False, "do_not_pad")
        if limit is not None and padded and pad_to_multiple_of and limit % pad_to_multiple_of:
            message = f"rows cut to {limit} tokens"
            raise ValueError(f"{message} cannot be padded to a multiple of {pad_to_multiple_of}")
        shape = {"limit": limit, "way": truncation, "stride": stride if return_overflowing_tokens else None}
        pads = {"padding": padding, "max_length": max_length}
        pads |= {"multiple": pad_to_multiple_of, "side": padding_side}

        def columns(places: bool) -> dict[str, list]:
            encoded = self.columns(rows, is_split_into_words, split, places, add_special_tokens, **shape)
            return self.padded(encoded, **pads)

        wanted = {
            "token_type_ids": return_token_type_ids,
            "special_tokens_mask": return_special_tokens_mask,
            "attention_mask": return_attention_mask is None or return_attention_mask,
            "offset_mapping": return_offsets_mapping,
            "overflow_to_sample_mapping": return_overflowing_tokens,
            "word_ids": False,
        }
        content = {
            name: column for name, column in columns(return_offsets_mapping).items() if wanted.get(name, True)
        }
        if return_length:
            content["length"] = [len(row) for row in content["input_ids"]]
        if return_tensors is None and not batched and not return_overflowing_tokens:
            content = {name: column if name == "length" else column[0] for name, column in content.items()}
        else:
            content = {name: tensor_of(name, column, return_tensors) for name, column in content.items()}
        return BatchEncoding(content, lambda: self.encodings_of(columns(has_texts(rows))))

    def columns(
        self,
        rows: list,
        words: bool,
        split: bool,
        places: bool,
        special: bool,
        *,
        limit: Any,
        way: Any,
        stride: Any,
    ) -> dict[str, list]:
        """Everything about the tokens of all rows, cut to `limit`."""
        columns: dict[str, list] = {name: [] for name in COLUMNS}
        prefix = [(token_id, (0, 0), 1, None) for token_id in self.plain.prefix_ids] if special else []
        for i, row in enumerate(rows):
            first, second = (
                None if one is None else self.tokens_of(one, words, places, split) for one in row
            )
            pieces = [(first, second)]
            if limit is not None:
                left = limit - len(prefix) * (1 if second is None else 2)
                pieces = self.windows(first, second, left, way, stride)
            for a, b in pieces:
                tokens = [(*token, 0, 1) for token in (*prefix, *a)]
                tokens += [] if b is None else [(*token, 1, 1) for token in (*prefix, *b)]
                for k, name in enumerate(COLUMNS[:6]):
                    columns[name].append([token[k] for token in tokens])
                columns["overflow_to_sample_mapping"].append(i)
        return columns

    def encodings_of(self, columns: dict[str, list]) -> list[Encoding]:
        encodings = []
        for i, ids in enumerate(columns["input_ids"]):
            row = {name: columns[name][i] for name in COLUMNS[1:6]}
            special, types = row["special_tokens_mask"], row["token_type_ids"]
            sequences = [None if mark else kind for kind, mark in zip(types, special, strict=True)]
            tokens, places = self.convert_ids_to_tokens(ids), row["offset_mapping"]
            more = (row["attention_mask"], special, row["word_ids"], sequences)
            encodings.append(Encoding(ids, types, tokens, places, *more))
        return encodings

    def prepare_for_model(
        self, ids: list[int], pair_ids: list[int] | None = None, **kwargs: Any
    ) -> BatchEncoding:
        """As a call, of ids."""
        return self(ids, pair_ids, **kwargs)

    def check_call(self, kwargs: dict) -> None:
        for name in ("text_target", "text_pair_target"):
            if kwargs.pop(name, None) is not None:
                message = "is for models with an encoder"
                raise ValueError(f"{name} {message}: give the target to another call as text")
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

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"padding_side={self.padding_side!r}, special_tokens={self.special_tokens_map})"
        )


def restored(kind: type, files: dict[str, bytes], state: dict) -> Any:
    """A tokenizer that was pickled or copied."""
    tokenizer = blank(kind)
    folder = tempfile.TemporaryDirectory(prefix="decoders-tokenizer-")
    for name, content in files.items():
        (Path(folder.name) / name).write_bytes(content)
    plain = tokenize.load(folder.name)
    vars(tokenizer).update(state, own_folder=folder, plain=plain, known=(-1, {}, {}))
    return tokenizer


class PreTrainedTokenizer(PreTrainedTokenizerBase):
    """Ids are the same as of the `...Fast` one of the same name."""


class PreTrainedTokenizerFast(PreTrainedTokenizerBase):
    """The class for which `is_fast` is true."""

    theirs = ("transformers", "PreTrainedTokenizerFast")
    is_fast = True
