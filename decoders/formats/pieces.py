"""A text cut into pieces of a vocabulary: by merges (BPE) or as the likeliest row of pieces (unigram)."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import inf


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Join neighbours, the pair of the lowest rank first, of equal ones the leftmost, until none has a rank.

    A heap over a linked list: n log n, also for one word of a million letters. What lies in the heap is one
    whole number, rank * n + place, which is compared faster than a pair.
    """
    n = len(symbols)
    parts = list(symbols)  # "" where one was joined to its left neighbour
    previous, following = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [ranks[pair] * n + i for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapify(heap)

    def offer(i: int, j: int) -> None:
        rank = ranks.get((parts[i], parts[j]))
        if rank is not None:
            heappush(heap, rank * n + i)

    while heap:
        rank, i = divmod(heappop(heap), n)
        j = following[i]
        if not parts[i] or j >= n or ranks.get((parts[i], parts[j])) != rank:
            continue  # one of the two was joined to another neighbour meanwhile
        parts[i], parts[j] = parts[i] + parts[j], ""
        following[i] = end = following[j]
        if end < n:
            previous[end] = i
            offer(i, end)
        if previous[i] >= 0:
            offer(previous[i], i)
    return [part for part in parts if part]


class Cutter:
    """Cuts text as Hugging Face's fast tokenizer cuts it: sentencepiece itself breaks ties in another order,
    and adds chances in float32. Between two characters that stand beside each other in no piece a text can be
    cut beforehand, so that words are cut once."""

    def __init__(self, pieces: Iterable[str], scores: dict[str, float], merges: list[tuple[str, str]] | None):
        unigram = merges is None
        self.ranks = {pair: rank for rank, pair in enumerate(merges or ())}
        whole = list(pieces) if unigram else [a + b for a, b in self.ranks]
        self.inside = {a + b for piece in whole for a, b in pairwise(piece)}
        self.scores, self.lowest = scores, min(scores.values()) - 10  # of a character without a piece
        self.longest: dict[str, int] = {}  # first character -> length of the longest piece
        for piece in whole if unigram else ():
            self.longest[piece[:1]] = max(len(piece), self.longest.get(piece[:1], 1))
        self.cut_word = lru_cache(2**16)(self.likeliest if unigram else self.merged)

    def cut(self, text: str) -> Iterator[str]:
        """Its pieces; characters that no piece has stand alone."""
        total = 0.0  # which decides ties in unigram: sums are rounded
        for word in self.words(text):
            pieces, close = self.cut_word(word)
            if close:
                pieces, _ = self.likeliest(word, total)
            for piece in pieces:
                total += self.scores.get(piece, self.lowest)
            yield from pieces

    def words(self, text: str) -> Iterator[str]:
        start = 0
        for end, pair in enumerate(pairwise(text), 1):
            if pair[0] + pair[1] not in self.inside:
                yield text[start:end]
                start = end
        if text:
            yield text[start:]

    def merged(self, word: str) -> tuple[list[str], bool]:
        return merge([*word], self.ranks), False

    def likeliest(self, word: str, before: float = 0.0) -> tuple[list[str], bool]:
        """The pieces of `word` whose chances have the largest sum, the longest last piece among equals, and
        whether rounding could change that. `before` is the sum of what stands before the word."""
        n, close = len(word), False
        best, starts = [before] + [-inf] * n, [0] * (n + 1)
        for i in range(n):
            for j in range(i + 1, min(n, i + self.longest.get(word[i], 1)) + 1):
                score = self.scores.get(word[i:j], self.lowest if j == i + 1 else None)
                if score is None:
                    continue
                close = close or abs(best[i] + score - best[j]) < 1e-6
                if best[i] + score > best[j]:
                    best[j], starts[j] = best[i] + score, i
        ends = [n]
        while ends[-1] > 0:
            ends.append(starts[ends[-1]])
        return [word[start:end] for end, start in pairwise(ends)][::-1], close
