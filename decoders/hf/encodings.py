"""What goes into a documented tokenizer's call, and what comes back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["AddedToken", "BatchEncoding"]

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
