"""Where in the text each token stands."""

from itertools import groupby
from typing import Any

from decoders import tokenize


def offsets_of(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """(begin, end) of each token in the text, blanks before it included. A character of several tokens
    belongs to each of them."""
    if isinstance(tokenizer.plain, tokenize.WordTokenizer):
        units = [i for i, char in enumerate(text) for _ in "".join(tokenize.plain_words(char))]
        sizes = [
            1 if id == tokenizer.unk_token_id else len(tokenizer.token_of(id).removesuffix("</w>"))
            for id in ids
        ]
    else:
        pieces = isinstance(tokenizer.plain, tokenize.PieceTokenizer)
        marks = len("▁".encode()) if pieces else 1
        lengths = [marks if char == " " else len(char.encode()) for char in text]
        units = [i for i, length in enumerate(lengths) for _ in range(length)]
        units = [0] * marks + units if pieces else units
        sizes = [1 if pieces and is_byte(tokenizer, id) else len(tokenizer.plain.bytes_of[id]) for id in ids]
    found, at = [], 0
    for size in sizes:
        mine = units[at : at + size]
        at += size
        found.append((mine[0], mine[-1] + 1) if mine else (len(text), len(text)))
    if getattr(tokenizer.plain, "unigram", False):  # what it does not know is one piece, spelled in bytes
        for _, run in groupby(range(len(ids)), lambda i: is_byte(tokenizer, ids[i])):
            first, *_, last = (*(run := list(run)), run[-1])
            if is_byte(tokenizer, ids[first]):
                found[first : last + 1] = [(found[first][0], found[last][1])] * len(run)
    return found


def is_byte(tokenizer: Any, token_id: int) -> bool:
    return bool(tokenize.BYTE_PIECE.fullmatch(tokenizer.token_of(token_id)))
