"""Where in the text each token stands, and in which of its words."""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

from decoders import tokenize


def located(plain: Any, text: str, split_special_tokens: bool) -> list[tuple[int, tuple[int, int], int]]:
    """(id, (begin, end) in the text, number of its word) of each token. Blanks that an added token swallows
    are its own."""
    tokens, first = [], 0
    for start, part, ids, is_added in plain.segments(text, split_special_tokens):
        spans = [(0, len(part))] if is_added else offsets_of(plain, part, ids)
        words = [0] if is_added else words_of(plain, part, ids)
        for id, (begin, end), word in zip(ids, spans, words, strict=True):
            tokens.append((id, (start + begin, start + end), first + word))
        first += 1 + max(words, default=-1)
    return tokens


# ---- Words -------------------------------------------------------------------------------------------------


def words_of(plain: Any, text: str, ids: list[int]) -> list[int]:
    """The word of each token of a text without added tokens: what the pattern of a byte-level tokenizer
    splits off, a word or mark of GPT-1, and for sentencepiece, which splits nothing beforehand, all."""
    if isinstance(plain, tokenize.PieceTokenizer):
        return words_of_pieces(ids, {*plain.normalized_ids.values()})
    if isinstance(plain, tokenize.WordTokenizer):
        sizes = sizes_of_words(plain, text)
        return [word for word, size in enumerate(sizes) for _ in range(size)]
    import regex

    pattern = plain.pattern.replace(r"\s", r"\p{White_Space}")
    ends = [*accumulate(len(piece.encode()) for piece in regex.findall(pattern, text))]
    begins = accumulate((len(plain.bytes_of[id]) for id in ids[:-1]), initial=0)
    return [bisect_right(ends, begin) for begin in begins] if ids else []


def words_of_pieces(ids: list[int], added: set[int]) -> list[int]:
    """Each of `added`, which are found in normalized text, is a word, and so is what stands between two."""
    words, word = [], -1
    for place, id in enumerate(ids):
        word += place == 0 or id in added or ids[place - 1] in added
        words.append(word)
    return words


def sizes_of_words(plain: Any, text: str) -> list[int]:
    """How many tokens each word of GPT-1 has; an added token that is found in normalized text is one."""
    if not plain.finder:
        return [len(plain.word_ids(word)) for word in plain_words_of(text)]
    text, sizes, done = tokenize.plain_text(text), [], 0
    for token in plain.finder.finditer(text):
        before = plain_words_of(text[done : token.start()])
        sizes += [*(len(plain.word_ids(word)) for word in before), 1]
        done = token.end()
    return sizes + [len(plain.word_ids(word)) for word in plain_words_of(text[done:])]


def plain_words_of(text: str) -> list[str]:
    return [word for chunk in tokenize.WORD_BREAKS.split(text) for word in tokenize.plain_words(chunk)]


# ---- Places ------------------------------------------------------------------------------------------------


def offsets_of(plain: Any, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """(begin, end) of each token of a text without added tokens, blanks before it included. A character of
    several tokens belongs to each of them."""
    if isinstance(plain, tokenize.PieceTokenizer):
        return spans_of_pieces(plain, text)
    if isinstance(plain, tokenize.WordTokenizer):
        return spans_of_words(plain, text)
    char_indices = [i for i, char in enumerate(text) for _ in char.encode()]
    return spans_of_sizes(text, char_indices, [len(plain.bytes_of[id]) for id in ids])


def spans_of_sizes(text: str, char_indices: list[int], sizes: list[int]) -> list[tuple[int, int]]:
    """`char_indices` in the text of what the tokenizer reads, of which each token has so many."""
    spans, done = [], 0
    for size in sizes:
        mine = char_indices[done : done + size]
        done += size
        spans.append((mine[0], mine[-1] + 1) if mine else (len(text), len(text)))
    return spans


def spans_of_words(plain: Any, text: str) -> list[tuple[int, int]]:
    """Of GPT-1, with added tokens that are found in normalized text."""
    if not plain.finder:
        return spans_of_letters(plain, text, 0)
    letters = [(letter, i) for i, char in enumerate(text) for letter in tokenize.plain_text(char)]
    char_indices = [*(i for _, i in letters), len(text)]
    spans, done = [], 0
    for token in plain.finder.finditer("".join(letter for letter, _ in letters)):
        begin, end = char_indices[token.start()], char_indices[token.end() - 1] + 1
        spans += [*spans_of_letters(plain, text[done:begin], done), (begin, end)]
        done = end
    return spans + spans_of_letters(plain, text[done:], done)


def spans_of_letters(plain: Any, text: str, start: int) -> list[tuple[int, int]]:
    char_indices = [i for i, char in enumerate(text) for _ in "".join(tokenize.plain_words(char))]
    ids, unknown = plain.ids_of_words(text), plain.vocab["<unk>"]
    names = {id: plain.bytes_of[id].decode().removesuffix("</w>") for id in {*ids}}
    sizes = [1 if id == unknown else len(names[id]) for id in ids]
    return [(start + begin, start + end) for begin, end in spans_of_sizes(text, char_indices, sizes)]


def spans_of_pieces(plain: Any, text: str) -> list[tuple[int, int]]:
    """Of sentencepiece, which puts a mark before the text: that belongs to the first letter."""
    char_indices = [0, *range(len(text))]
    spans, done = [], 0
    for size, tokens in plain.pieces_with_sizes(text):
        mine = char_indices[done : done + size]
        spans += [(mine[0], mine[-1] + 1)] * tokens
        done += size
    return spans
