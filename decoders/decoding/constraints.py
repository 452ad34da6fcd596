"""Words that a text must contain, for beam search: a phrase, or one of several.

Beams are sorted into banks by how much of the constraints they have met, and every bank keeps its best ones
(Post and Vilar, 2018, arXiv:1804.06609). Only new tokens count. Transformers 4.50, the last that has this,
counts the prompt too, goes on in the middle of a phrase after a wrong token, and mixes banks where scores
differ by more than 100.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Constraint:
    """`phrases`: token ids of which one phrase must come."""

    phrases: list[tuple[int, ...]]


class PhrasalConstraint(Constraint):
    """These tokens one after the other."""

    def __init__(self, token_ids: Sequence[int]):
        self.phrases = read_phrases([token_ids])


class DisjunctiveConstraint(Constraint):
    """One of several phrases, of which none begins another."""

    def __init__(self, nested_token_ids: Sequence[Sequence[int]]):
        self.phrases = read_phrases(nested_token_ids)


def read_phrases(given: Any) -> list[tuple[int, ...]]:
    """ValueError for what are no lists of ids, or where one phrase begins another."""
    if not is_list_of_phrases(given):
        raise ValueError(f"a constraint must be a list of token ids, or several of them, not {given!r}")
    phrases = [tuple(phrase) for phrase in given]
    if any(a != b and b[: len(a)] == a for a in phrases for b in phrases):
        raise ValueError(f"of the ways to meet a constraint none may begin another: {given!r}")
    return phrases


def is_list_of_phrases(given: Any) -> bool:
    def is_phrase(ids: Any) -> bool:
        return isinstance(ids, Sequence) and len(ids) > 0 and all(type(id) is int and id >= 0 for id in ids)

    return isinstance(given, Sequence) and len(given) > 0 and all(map(is_phrase, given))


def read_constraints(s: Any) -> list[Constraint]:
    """What the settings ask for. ValueError for what is no constraint."""
    found = list(s.constraints or ())
    for words in s.force_words_ids or ():
        nested = isinstance(words, Sequence) and words and isinstance(words[0], Sequence)
        found.append(DisjunctiveConstraint(words) if nested else PhrasalConstraint(words))
    for constraint in found:
        if not isinstance(constraint, Constraint):
            raise ValueError(
                f"constraints must be PhrasalConstraint or DisjunctiveConstraint, not {constraint!r}"
            )
    return found


class Progress(NamedTuple):
    """How far a beam has come: the constraints that are unmet, and of the one begun the tokens so far."""

    unmet: tuple[int, ...]
    begun: int | None = None
    tokens: tuple[int, ...] = ()

    def after(self, token: int, constraints: Sequence[Constraint]) -> "Progress":
        if self.begun is not None:
            tokens = (*self.tokens, token)
            if tokens in constraints[self.begun].phrases:
                return Progress(tuple(i for i in self.unmet if i != self.begun))
            if any(phrase[: len(tokens)] == tokens for phrase in constraints[self.begun].phrases):
                return Progress(self.unmet, self.begun, tokens)
        for i in self.unmet:  # a wrong token may begin one anew
            if (token,) in constraints[i].phrases:
                return Progress(tuple(j for j in self.unmet if j != i))
            if any(phrase[0] == token for phrase in constraints[i].phrases):
                return Progress(self.unmet, i, (token,))
        return Progress(self.unmet)

    def next_tokens(self, constraints: Sequence[Constraint]) -> list[int]:
        """Tokens that bring the beam nearer to a constraint."""
        n = len(self.tokens)
        candidates = self.unmet if self.begun is None else (self.begun,)
        phrases = [phrase for i in candidates for phrase in constraints[i].phrases]
        return list(dict.fromkeys(phrase[n] for phrase in phrases if phrase[:n] == self.tokens))

    def bank(self, constraints: Sequence[Constraint]) -> int:
        """How much is met: constraints count as much as the longest one has tokens."""
        longest = max(len(phrase) for constraint in constraints for phrase in constraint.phrases)
        met = len(constraints) - len(self.unmet)
        if self.begun is None:
            return met * longest
        own = max(len(phrase) for phrase in constraints[self.begun].phrases)
        return met * longest + longest - (own - len(self.tokens))


class Beam(NamedTuple):
    row: int
    token: int
    sum: float
    progress: Progress


def allocate(pool: list[Beam], constraints: Sequence[Constraint], size: int) -> list[Beam]:
    """The best of each bank, the fullest bank first, then the second best of each, up to `size`."""
    banks: dict[int, list[Beam]] = {}
    for beam in sorted(pool, key=lambda beam: -beam.sum):
        banks.setdefault(beam.progress.bank(constraints), []).append(beam)
    ranked = [(rank, -bank, beam) for bank, beams in banks.items() for rank, beam in enumerate(beams)]
    return [beam for _, _, beam in sorted(ranked, key=lambda r: r[:2])[:size]]
