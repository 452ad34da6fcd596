"""What goes into a documented tokenizer's call, and what comes back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["AddedToken", "BatchEncoding"]

# ---- What a tokenizer returns ------------------------------------------------------------------------------


class Encoding(NamedTuple):
    """All that is known of the tokens of one row."""

    ids: list[int]
    type_ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    attention_mask: list[int]
    special_tokens_mask: list[int]
    word_ids: list[int | None]  # of words given apart, else those that the tokenizer splits off first
    sequence_ids: list[int | None]  # 0 or 1, of a pair


class BatchEncoding(dict):
    """Names and lists, or tensors; names are attributes too, a number is a row. What the tokenizer knows
    besides is asked for by row (0 if left out): words, sequences, places in the text."""

    def __init__(self, content: Any = (), encode: Callable[[], list[Encoding]] | None = None):
        super().__init__(content)
        vars(self).update(encode=encode, kept=None)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the encoding has no {name!r}, only {', '.join(self)}")

    def __getitem__(self, key: Any) -> Any:
        return self.encodings[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def __reduce__(self) -> tuple:
        return BatchEncoding, (dict(self),)

    @property
    def data(self) -> dict:
        return self

    @property
    def encodings(self) -> list[Encoding]:
        if self.kept is None:
            if self.encode is None:
                raise ValueError("only a tokenizer's own encoding knows words, sequences and places")
            vars(self)["kept"] = self.encode()
        return self.kept

    is_fast = True
    n_sequences = property(lambda self: 1 + max((n for n in self.sequence_ids() if n is not None), default=0))

    def tokens(self, batch_index: int = 0) -> list[str]:
        return self.encodings[batch_index].tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        return self.encodings[batch_index].word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        return self.encodings[batch_index].sequence_ids

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        row, token = row_and_place(batch_or_token_index, token_index)
        return self.encodings[row].word_ids[token]

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        row, token = row_and_place(batch_or_token_index, token_index)
        return self.encodings[row].sequence_ids[token]

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> "CharSpan | None":
        """Where the token stands in its text; None for one that the tokenizer has put there."""
        row, token = row_and_place(batch_or_token_index, token_index)
        encoding = self.encodings[row]
        if encoding.sequence_ids[token] is None:
            return None
        return CharSpan(*encoding.offsets[token])

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The first token of this character of the text; None where there is none."""
        row, char = row_and_place(batch_or_char_index, char_index)
        encoding = self.encodings[row]
        for token, (begin, end) in enumerate(encoding.offsets):
            if encoding.sequence_ids[token] == sequence_index and begin <= char < end:
                return token
        return None

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> "TokenSpan | None":
        row, word = row_and_place(batch_or_word_index, word_index)
        encoding = self.encodings[row]
        both = zip(encoding.word_ids, encoding.sequence_ids, strict=True)
        places = [token for token, found in enumerate(both) if found == (word, sequence_index)]
        return TokenSpan(places[0], places[-1] + 1) if places else None

    def convert_to_tensors(self, tensor_type: str | None = None, **kwargs: Any) -> "BatchEncoding":
        for name, rows in self.items():
            self[name] = tensor_of(name, rows, tensor_type)
        return self

    def to(self, device: Any, *args: Any, **kwargs: Any) -> "BatchEncoding":
        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(one) for one in value]
            return value.to(device, *args, **kwargs) if isinstance(value, Tensor) else value

        for name, value in self.items():
            self[name] = moved(value)
        return self


class CharSpan(NamedTuple):
    start: int
    end: int


class TokenSpan(NamedTuple):
    start: int
    end: int


def row_and_place(first: int, second: int | None) -> tuple[int, int]:
    """Of one number it is the place, in row 0."""
    return (0, first) if second is None else (first, second)


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


# ---- Texts and tensors -------------------------------------------------------------------------------------


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
        if pair is not None:
            check_texts(pair, "text_pair")
        return [(text, pair or None)], False
    if pair is None and not words and any(is_pair(row) for row in text):
        if not all(is_pair(row) for row in text):
            raise ValueError("some rows are pairs of texts and others are not: give all alike")
        return [(row[0], row[1]) for row in text], True
    others = [None] * len(text) if pair is None else list(pair)
    if len(text) != len(others):
        raise ValueError(f"{len(text)} texts and {len(others)} pairs to them: give one for each")
    return list(zip(text, others, strict=True)), True


def has_texts(rows: list[tuple[Any, Any]]) -> bool:
    """Whether rows are texts, or words, and no ids."""
    lists = [one for row in rows for one in row if isinstance(one, list | tuple)]
    return all(isinstance(word, str) for words in lists for word in words)


def is_pair(row: Any) -> bool:
    return isinstance(row, list | tuple) and len(row) == 2 and all(isinstance(text, str) for text in row)


def check_texts(text: Any, name: str) -> None:
    """ValueError for what is no text, row of them, or row of pairs, words or ids."""

    def fine(one: Any, depth: int) -> bool:
        listed = isinstance(one, list | tuple) and depth < 3
        return isinstance(one, str | int) or (listed and all(fine(part, depth + 1) for part in one))

    if isinstance(text, int) or not fine(text, 0):
        message = "must be a text, a list of texts, of pairs or of word lists"
        raise ValueError(f"{name} {message}, not {text!r:.60}")


def tensor_of(name: str, rows: list, kind: str | None) -> Any:
    if kind is None:
        return rows
    if kind not in ("pt", "np"):
        message = "TensorFlow and JAX take 'np' as well"
        raise ValueError(f"return_tensors must be 'pt' or 'np', not {kind!r}: {message}")
    if len({len(row) for row in rows if isinstance(row, list)}) > 1:
        message = "give padding=True to make one tensor of them"
        raise ValueError(f"rows of {name} have different lengths: {message}")
    if kind == "np":
        import numpy

        return numpy.array(rows, dtype=numpy.int64)
    return torch.tensor(rows, dtype=torch.long)
