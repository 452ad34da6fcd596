"""The documented tokenizers, over `decoders.tokenize`: for `hf.py`.

    tokenizer = AutoTokenizer.from_pretrained("microsoft/phi-2")
    tokenizer(["one text", "and another"], padding=True, return_tensors="pt")

`tokenizer.plain` is ours; ids are those of the fast tokenizers, whichever class is asked for.
"""

import difflib
import inspect
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decoders import tokenize
from decoders.formats.folder import find, read_json_if_any, read_text
from decoders.formats.switch import switched
from decoders.formats.vocab import TOKENIZER_FILES

# ---- Arguments ---------------------------------------------------------------------------------------------

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
OLD_HUB = (
    "resume_download",
    "proxies",
    "mirror",
    "_commit_hash",
    "_from_auto",
    "user_agent",
    "code_revision",
)
told: set[str] = set()  # what has been said once


def hub_options(kwargs: dict[str, Any]) -> tuple[dict, dict]:
    """(what is for the hub, what is left)."""
    given = {name: value for name, value in kwargs.items() if name in HUB and value is not None}
    if kwargs.get("use_auth_token") is not None:
        given.setdefault("token", kwargs["use_auth_token"])
    left = {name: value for name, value in kwargs.items() if name not in (*HUB, *OLD_HUB, "use_auth_token")}
    return given, left


def no_effect(name: str, why: str) -> None:
    """Said once: a documented argument that makes no difference here."""
    if name not in told:
        told.add(name)
        warnings.warn(f"{name} has no effect: {why}", stacklevel=4)


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {near[0]!r}?" if near else ""


def unexpected(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    if name := min(names, default=None):
        raise TypeError(f"{where} got an unexpected keyword argument {name!r}{nearest(name, known)}")


# ---- What a tokenizer returns ------------------------------------------------------------------------------


class BatchEncoding(dict):
    """Names and lists, or tensors; names are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the encoding has no {name!r}, only {', '.join(self)}")

    @property
    def data(self) -> dict:
        return self

    def to(self, device: Any, *args: Any, **kwargs: Any) -> "BatchEncoding":
        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(one) for one in value]
            return value.to(device, *args, **kwargs) if isinstance(value, Tensor) else value

        for name, value in self.items():
            self[name] = moved(value)
        return self


class AddedToken(NamedTuple):
    """A text that becomes one token, and whether it swallows blanks before and after it."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def __str__(self) -> str:
        return self.content


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
VERY_LARGE = int(1e30)  # the documented model_max_length of a tokenizer that has none


def cleaned(text: str) -> str:
    """Without the blanks that GPT-1's words leave before punctuation. It changes code and quotes."""
    for before, after in CLEAN:
        text = text.replace(before, after)
    return text


# ---- Tokenizers --------------------------------------------------------------------------------------------


class PreTrainedTokenizerBase:
    """The documented manners over a tokenizer of ours."""

    kind: type = tokenize.Tokenizer  # of ours
    defaults: dict[str, str] = {}  # role -> token
    vocab_files_names: dict[str, str] = {}
    model_input_names = ("input_ids", "attention_mask")
    is_fast, pad_token_type_id = False, 0

    def __init__(self, *files: Any, plain: tokenize.Tokenizer | None = None, **kwargs: Any):
        names = [*self.vocab_files_names, "tokenizer_file"]
        given = dict(zip(names, files, strict=False)) | {n: kwargs.pop(n) for n in names if kwargs.get(n)}
        if plain is None:
            self.own_folder = tempfile.TemporaryDirectory(prefix="decoders-tokenizer-")
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
        plain.add_special_tokens(token for token in asked if plain.token_id(token) is None)
        own_left = isinstance(plain, tokenize.PieceTokenizer) and "padding_side" not in config
        self.padding_side = config.get("padding_side") or ("left" if own_left else "right")
        self.truncation_side = config.get("truncation_side") or "right"
        self.model_max_length = int(config.get("model_max_length") or VERY_LARGE)
        words = isinstance(plain, tokenize.WordTokenizer)
        self.clean_up_tokenization_spaces = bool(config.get("clean_up_tokenization_spaces", words))
        self.add_prefix_space = bool(config.get("add_prefix_space"))
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
            told = " or ".join(name for name, kind in KINDS.items() if isinstance(plain, kind))
            raise ValueError(f"{plain.folder} holds no {cls.__name__}: use {told}, or AutoTokenizer")
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
            t.id: AddedToken(t.content, False, t.lstrip, t.rstrip, t.normalized, t.special)
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
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        flags = ("lstrip", "rstrip")
        return sum(
            self.plain.add_token(
                content_of(token),
                special_tokens or getattr(token, "special", False),
                **{flag: getattr(token, flag, False) is True for flag in flags},
            )
            for token in tokens
        )

    # ---- Texts to ids ----

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        return self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def ids_of(self, text: Any, words: bool) -> list[int]:
        """Of one text, of one in words, or ids as they are."""
        if words:
            prefix = ""
            if isinstance(self.plain, tokenize.ByteLevelTokenizer):
                if not self.add_prefix_space:
                    told = "words need the space before them"
                    raise ValueError(f"{told}: load the tokenizer with add_prefix_space=True")
                prefix = " "
            return [id for word in text for id in self.plain.encode(prefix + word, add_special_tokens=False)]
        if isinstance(text, list | tuple):
            return [id if isinstance(id, int) else self.convert_tokens_to_ids(id) for id in text]
        if self.add_prefix_space and text and not text[0].isspace():
            text = " " + text
        return self.plain.encode(text, add_special_tokens=False)

    def tokens_of(self, text: Any, words: bool, places: bool) -> list[tuple[int, tuple[int, int], int]]:
        """(id, (begin, end) in the text, 0) of each token; places only where they are asked for."""
        ids = self.ids_of(text, words)
        spans = [(0, 0)] * len(ids)
        if places and words:
            spans = [span for word in text for span in self.places(word, self.ids_of([word], True))]
        elif places:
            if not isinstance(text, str):
                raise ValueError("return_offsets_mapping needs texts: ids have no place in one")
            spans = self.places(text, ids)
        return [(id, span, 0) for id, span in zip(ids, spans, strict=True)]

    def places(self, text: str, ids: list[int]) -> list[tuple[int, int]]:
        """(begin, end) of each token in the text, blanks before it included. A character of several tokens
        belongs to each of them."""
        if isinstance(self.plain, tokenize.WordTokenizer):
            units = [i for i, char in enumerate(text) for _ in "".join(tokenize.plain_words(char))]
            sizes = [
                1 if id == self.unk_token_id else len(self.token_of(id).removesuffix("</w>")) for id in ids
            ]
        else:
            pieces = isinstance(self.plain, tokenize.PieceTokenizer)
            marks = len("▁".encode()) if pieces else 1
            lengths = [marks if char == " " else len(char.encode()) for char in text]
            units = [i for i, length in enumerate(lengths) for _ in range(length)]
            units = [0] * marks + units if pieces else units
            sizes = [1 if pieces and self.is_byte(id) else len(self.plain.bytes_of[id]) for id in ids]
        found, at = [], 0
        for size in sizes:
            mine = units[at : at + size]
            at += size
            found.append((mine[0], mine[-1] + 1) if mine else (len(text), len(text)))
        if getattr(self.plain, "unigram", False):  # what it does not know is one piece, spelled in bytes
            for _, run in groupby(range(len(ids)), lambda i: self.is_byte(ids[i])):
                first, *_, last = (*(run := list(run)), run[-1])
                if self.is_byte(ids[first]):
                    found[first : last + 1] = [(found[first][0], found[last][1])] * len(run)
        return found

    def is_byte(self, id: int) -> bool:
        return bool(tokenize.BYTE_PIECE.fullmatch(self.token_of(id)))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list:
        before = list(self.plain.before)
        return [*before, *token_ids_0, *([] if token_ids_1 is None else [*before, *token_ids_1])]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list, token_ids_1: list | None = None
    ) -> list[int]:
        n = len(self.plain.before)
        return [0] * (n + len(token_ids_0)) + ([] if token_ids_1 is None else [1] * (n + len(token_ids_1)))

    def get_special_tokens_mask(
        self, token_ids_0: list, token_ids_1: list | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return [int(id in self.all_special_ids) for id in token_ids_0]
        before = [1] * len(self.plain.before)
        first = [*before, *(0 for _ in token_ids_0)]
        return first if token_ids_1 is None else [*first, *before, *(0 for _ in token_ids_1)]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return len(self.plain.before) * (2 if pair else 1)

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
        self.check_call(kwargs)
        rows, batched = rows_of(text, text_pair, is_split_into_words)
        limit, padded = self.limit_of(truncation, max_length, padding), padding not in (False, "do_not_pad")
        if limit is not None and padded and pad_to_multiple_of and limit % pad_to_multiple_of:
            told = f"rows cut to {limit} tokens"
            raise ValueError(f"{told} cannot be padded to a multiple of {pad_to_multiple_of}")
        found: dict[str, list] = {name: [] for name in COLUMNS}
        begin = [(id, (0, 0), 1) for id in self.plain.before] if add_special_tokens else []
        for i, row in enumerate(rows):
            a, b = (
                None if one is None else self.tokens_of(one, is_split_into_words, return_offsets_mapping)
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
        split = kwargs.pop("split_special_tokens", False)
        if split:
            told = "use tokenizer.plain.encode(text, split_special_tokens=True)"
            raise ValueError(f"split_special_tokens: {told}")
        unexpected(f"{type(self).__name__}()", kwargs, inspect.signature(type(self).__call__).parameters)

    def limit_of(self, truncation: Any, max_length: int | None, padding: Any) -> int | None:
        """The longest row, or None. ValueError for what is no way to truncate."""
        ways = (True, "longest_first", "only_first", "only_second")
        if truncation not in (*ways, False, None, "do_not_truncate"):
            told = "must be True, False, 'longest_first', 'only_first', 'only_second' or 'do_not_truncate'"
            raise ValueError(f"truncation {told}, not {truncation!r}")
        if truncation is None and max_length is not None and padding is False:
            truncation = True  # as documented: a length alone asks for it
        if truncation not in ways:
            return None
        limit = self.model_max_length if max_length is None else max_length
        return None if limit >= VERY_LARGE else limit

    def windows(self, a: list, b: list | None, limit: int, way: Any, stride: int | None) -> list[tuple]:
        """Both, shortened until they fit; with `stride` what was cut off of the one that is shortened too."""
        n, m = self.lengths(len(a), None if b is None else len(b), limit, way)
        left = self.truncation_side == "left"
        if stride is None or (n == len(a) and m == len(b or ())):
            cut = (lambda ids, n: ids[len(ids) - n :]) if left else (lambda ids, n: ids[:n])
            return [(cut(a, n), None if b is None else cut(b, m))]
        whole, size = (b, m) if n == len(a) else (a, n)
        if b is not None and n < len(a) and m < len(b):
            told = "needs truncation='only_first' or 'only_second'"
            raise ValueError(f"return_overflowing_tokens of pairs {told}")
        if stride >= size:
            raise ValueError(f"stride {stride} is not less than the {size} tokens that a row may have")
        parts, end = [], len(whole) if left else 0
        while not parts or (end > 0 if left else end < len(whole)):
            start = max(0, end - size) if left else max(0, end - (stride if parts else 0))
            stop = end if left else min(len(whole), start + size)
            parts.append(whole[start:stop])
            end = (start + stride if start else 0) if left else stop
        return [(part, b) if whole is a else (a, part) for part in parts]

    def lengths(self, n: int, m: int | None, limit: int, way: Any) -> tuple[int, int]:
        """How many tokens stay of each: by default the longer one is cut, down to as many as the other."""
        over, alone, m = n + (m or 0) - limit, m is None, m or 0
        if over <= 0:
            return n, m
        if way == "only_second" and alone:
            raise ValueError("truncation='only_second' needs a second text")
        if way == "only_second":
            m -= over
        elif way == "only_first" or alone:
            n -= over
        else:
            small, large = min(n, m), max(n, m)
            large = small if small > limit else max(small, limit - small)
            if small + large > limit:
                small = limit // 2
                large = small + limit % 2
            n, m = (small, large) if n <= m else (large, small)
        if min(n, m) < 0 or (way in ("only_first", "only_second") and (n if way == "only_first" else m) == 0):
            told = f"and truncation={way!r} has too few to remove"
            raise ValueError(f"{over} tokens are too many, {told}: give a larger max_length")
        return n, m

    def padded(
        self,
        found: dict[str, list],
        padding: Any,
        max_length: int | None,
        multiple: int | None,
        side: str | None,
    ) -> dict[str, list]:
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            told = "must be True, False, 'longest', 'max_length' or 'do_not_pad'"
            raise ValueError(f"padding {told}, not {padding!r}")
        if padding in (False, "do_not_pad"):
            return found
        if self.pad_token_id is None:
            raise ValueError(
                "padding needs a pad_token: set tokenizer.pad_token = tokenizer.eos_token, or "
                "add one with tokenizer.add_special_tokens({'pad_token': '[PAD]'})"
            )
        side = side or self.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {side!r}")
        longest = max(map(len, found["input_ids"]), default=0)
        if padding == "max_length":
            longest = self.model_max_length if max_length is None else max_length
            if longest >= VERY_LARGE:
                raise ValueError("padding='max_length' needs max_length: the tokenizer has none")
        longest = -(-longest // multiple) * multiple if multiple else longest
        fillers = {
            "input_ids": self.pad_token_id,
            "token_type_ids": self.pad_token_type_id,
            "attention_mask": 0,
            "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
        }

        def filled(row: list, filler: Any) -> list:
            more = [filler] * (longest - len(row))
            return [*more, *row] if side == "left" else [*row, *more]

        return {
            name: [filled(row, fillers[name]) for row in rows] if name in fillers else rows
            for name, rows in found.items()
        }

    def pad(
        self,
        encoded_inputs: Any,
        padding: Any = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Rows of one length, from encodings of different ones, as a data collator needs it."""
        if isinstance(encoded_inputs, list | tuple):
            encoded_inputs = {name: [one[name] for one in encoded_inputs] for name in encoded_inputs[0]}
        single = not isinstance(encoded_inputs["input_ids"][0], list | tuple | Tensor)
        whole = {name: [rows] if single else rows for name, rows in encoded_inputs.items()}
        found = {
            name: [list(map(int, row)) if hasattr(row, "__len__") else row for row in rows]
            for name, rows in whole.items()
        }
        if return_attention_mask is not False:
            found.setdefault("attention_mask", [[1] * len(row) for row in found["input_ids"]])
        done = self.padded(found, padding, max_length, pad_to_multiple_of, padding_side)
        if return_tensors is None and single:
            return BatchEncoding({name: rows[0] for name, rows in done.items()})
        return BatchEncoding({name: tensor_of(name, rows, return_tensors) for name, rows in done.items()})

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

    # ---- Conversations ----

    def apply_chat_template(
        self,
        conversation: list,
        tools: list | None = None,
        documents: list | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: Any = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or a list of them, as the checkpoint's template writes it, or as its chat format
        where it has none: text, or ids. Control tokens written in a message count, as in Transformers;
        `tokenizer.plain.chat` takes them for text."""
        if continue_final_message and add_generation_prompt:
            told = "continue_final_message goes on with an answer, add_generation_prompt begins one"
            raise ValueError(f"{told}: give one of them")
        if return_assistant_tokens_mask:
            told = "needs a template that marks answers: none of these does"
            raise ValueError(f"return_assistant_tokens_mask {told}")
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        texts = [
            self.conversation_text(
                list(one),
                chat_template,
                tools,
                documents,
                add_generation_prompt,
                continue_final_message,
                kwargs,
            )
            for one in (conversation if batched else [conversation])
        ]
        if not tokenize:
            return texts if batched else texts[0]
        options = {"truncation": truncation, "max_length": max_length, "return_tensors": return_tensors}
        found = self(
            texts if batched else texts[0],
            add_special_tokens=False,
            padding=padding,
            **{**options, **(tokenizer_kwargs or {})},
        )
        return found if return_dict else found["input_ids"]

    def conversation_text(
        self,
        messages: list[dict],
        template: str | None,
        tools: Any,
        documents: Any,
        prompt: bool,
        go_on: bool,
        more: dict,
    ) -> str:
        template = template or self.chat_template
        if template is None:
            return self.format_text(messages, prompt, go_on)
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def stop(message):
            raise TemplateError(message)

        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        world.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, indent=indent, ensure_ascii=False
        )
        world.globals["raise_exception"] = stop
        try:
            text = world.from_string(template).render(
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=prompt,
                **self.special_tokens_map,
                **more,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refused the conversation: {error}") from None
        if not go_on:
            return text
        last = messages[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def format_text(self, messages: list[dict], prompt: bool, go_on: bool) -> str:
        if self.plain.chat_format is None:
            raise ValueError(f"{self.name_or_path} has no chat_template: give one")
        if prompt:
            return "".join(part for part, _ in self.plain.chat_format(messages))
        asked = [part for part, _ in self.plain.chat_format([*messages, {"role": "user", "content": ""}])]
        begin = asked[: len(asked) - 4]  # before the empty question, and what asks for its answer
        return "".join(begin).rstrip() if go_on else "".join(begin)

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


def content_of(token: Any) -> str | None:
    """Of a text, an AddedToken of any library, or its entry in a file."""
    if isinstance(token, dict):
        return token["content"]
    return token if token is None or isinstance(token, str) else token.content


def rows_of(text: Any, pair: Any, words: bool) -> tuple[list[tuple[Any, Any]], bool]:
    """(each text and what is paired with it or None, whether there was a list of them)."""
    check_texts(text, "text")
    if isinstance(pair, list | tuple) and not words and isinstance(text, str):
        raise ValueError("text is one text and text_pair several: give both alike")
    batched = isinstance(text, list | tuple) and (
        not text or isinstance(text[0], list | tuple) or (not words and isinstance(text[0], str))
    )
    if not batched:
        return [(text, pair or None)], False
    if pair is None and not words and any(is_pair(row) for row in text):
        return [(row[0], row[1]) for row in text], True
    others = [None] * len(text) if pair is None else list(pair)
    if len(text) != len(others):
        raise ValueError(f"{len(text)} texts and {len(others)} pairs to them: give one for each")
    return list(zip(text, others, strict=True)), True


def is_pair(row: Any) -> bool:
    return isinstance(row, list | tuple) and len(row) == 2 and all(isinstance(text, str) for text in row)


def check_texts(text: Any, name: str) -> None:
    """ValueError for what is no text, row of them, or row of pairs, words or ids."""

    def fine(one: Any, depth: int) -> bool:
        listed = isinstance(one, list | tuple) and depth < 3
        return isinstance(one, str | int) or (listed and all(fine(part, depth + 1) for part in one))

    if isinstance(text, int) or not fine(text, 0):
        told = "must be a text, a list of texts, of pairs or of word lists"
        raise ValueError(f"{name} {told}, not {text!r:.60}")


def tensor_of(name: str, rows: list, kind: str | None) -> Any:
    if kind is None:
        return rows
    if kind not in ("pt", "np"):
        told = "TensorFlow and JAX take 'np' as well"
        raise ValueError(f"return_tensors must be 'pt' or 'np', not {kind!r}: {told}")
    if len({len(row) for row in rows if isinstance(row, list)}) > 1:
        told = "give padding=True to make one tensor of them"
        raise ValueError(f"rows of {name} have different lengths: {told}")
    if kind == "np":
        import numpy

        return numpy.array(rows, dtype=numpy.int64)
    return torch.tensor(rows, dtype=torch.long)


class PreTrainedTokenizer(PreTrainedTokenizerBase):
    """Ids are the same as of the `...Fast` one of the same name."""


class PreTrainedTokenizerFast(PreTrainedTokenizerBase):
    is_fast = True


BYTES = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
PIECES = {"vocab_file": "tokenizer.model"}
END = "<|endoftext|>"


def documented_tokenizer(name: str, kind: type, files: dict[str, str], **defaults: str) -> tuple[type, type]:
    """The class and the `...Fast` one, which take files of a vocabulary as well."""
    names = [*files, "tokenizer_file", *(f"{role}_token" for role in defaults)]

    def __init__(self, *files, **kwargs):
        PreTrainedTokenizerBase.__init__(self, *files, **kwargs)

    kind_of = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(one, kind_of, default=None) for one in ("self", *names)]
    parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
    __init__.__signature__ = inspect.Signature(parameters)
    content = {
        "kind": kind,
        "vocab_files_names": files,
        "defaults": defaults,
        "__module__": __name__,
        "__init__": __init__,
    }
    return tuple(
        type(name + end, (base,), content)
        for base, end in ((PreTrainedTokenizer, ""), (PreTrainedTokenizerFast, "Fast"))
    )


GPT2Tokenizer, GPT2TokenizerFast = documented_tokenizer(
    "GPT2Tokenizer", tokenize.ByteLevelTokenizer, BYTES, bos=END, eos=END, unk=END
)
CodeGenTokenizer, CodeGenTokenizerFast = documented_tokenizer(
    "CodeGenTokenizer", tokenize.ByteLevelTokenizer, BYTES, bos=END, eos=END, unk=END
)
LlamaTokenizer, LlamaTokenizerFast = documented_tokenizer(
    "LlamaTokenizer", tokenize.PieceTokenizer, PIECES, bos="<s>", eos="</s>", unk="<unk>"
)
PersimmonTokenizer, PersimmonTokenizerFast = documented_tokenizer(
    "PersimmonTokenizer", tokenize.PieceTokenizer, PIECES, bos="<s>", eos="</s>", unk="<unk>"
)
OpenAIGPTTokenizer, OpenAIGPTTokenizerFast = documented_tokenizer(
    "OpenAIGPTTokenizer", tokenize.WordTokenizer, BYTES, unk="<unk>"
)
KINDS = {
    "LlamaTokenizer": tokenize.PieceTokenizer,
    "OpenAIGPTTokenizer": tokenize.WordTokenizer,
    "GPT2Tokenizer": tokenize.ByteLevelTokenizer,
    "CodeGenTokenizer": tokenize.ByteLevelTokenizer,
}


class AutoTokenizer:
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
        cls = globals()[name + ("Fast" if use_fast else "")]
        return cls.over(plain, pretrained_model_name_or_path, kwargs)
