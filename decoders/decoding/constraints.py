"""Words that a text must contain, for beam search: a phrase, or one of several.

Beams are sorted into banks by how much of the constraints they have met, and every bank keeps its best ones
(Post and Vilar, 2018, arXiv:1804.06609). Only new tokens count. Transformers 4.50, the last that has this,
counts the prompt too, goes on in the middle of a phrase after a wrong token, and mixes banks where scores
differ by more than 100.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class PhrasalConstraint:
    """These tokens in a row."""

    def __init__(self, token_ids: Sequence[int]):
        self.ways = checked([token_ids])


class DisjunctiveConstraint:
    """One of several rows of tokens, of which none begins another."""

    def __init__(self, nested_token_ids: Sequence[Sequence[int]]):
        self.ways = checked(nested_token_ids)


def checked(ways: Any) -> list[tuple[int, ...]]:
    found = [tuple(way) for way in ways if isinstance(way, Sequence)] if isinstance(ways, Sequence) else []
    whole = len(found) == len(ways) > 0 if isinstance(ways, Sequence) else False
    if not whole or not all(way and all(type(id) is int and id >= 0 for id in way) for way in found):
        raise ValueError(f"a constraint must be a list of token ids, or several of them, not {ways!r}")
    if any(a != b and b[: len(a)] == a for a in found for b in found):
        raise ValueError(f"of the ways to meet a constraint none may begin another: {ways!r}")
    return found


def constraints_of(s: Any) -> list:
    """What the settings ask for, as a list of constraints. ValueError for what is none."""
    found = list(s.constraints or ())
    for words in s.force_words_ids or ():
        nested = isinstance(words, Sequence) and words and isinstance(words[0], Sequence)
        found.append(DisjunctiveConstraint(words) if nested else PhrasalConstraint(words))
    if wrong := [one for one in found if not hasattr(one, "ways")]:
        raise ValueError(f"constraints must be PhrasalConstraint or DisjunctiveConstraint, not {wrong[0]!r}")
    return found


class State(NamedTuple):
    """How far a text has come: the constraints that are left, and of the one begun the tokens so far."""

    left: tuple[int, ...]
    begun: int | None = None
    tokens: tuple[int, ...] = ()

    def after(self, token: int, constraints: list) -> "State":
        if self.begun is not None:
            tokens = (*self.tokens, token)
            if tokens in constraints[self.begun].ways:
                return State(tuple(i for i in self.left if i != self.begun))
            if any(way[: len(tokens)] == tokens for way in constraints[self.begun].ways):
                return State(self.left, self.begun, tokens)
        for i in self.left:  # a wrong token may begin one anew
            if (token,) in constraints[i].ways:
                return State(tuple(j for j in self.left if j != i))
            if any(way[0] == token for way in constraints[i].ways):
                return State(self.left, i, (token,))
        return State(self.left)

    def steps(self, constraints: list) -> list[int]:
        """Tokens that lead on."""
        ways = [
            (way, len(self.tokens))
            for i in (self.left if self.begun is None else (self.begun,))
            for way in constraints[i].ways
            if way[: len(self.tokens)] == self.tokens
        ]
        return list(dict.fromkeys(way[n] for way, n in ways))

    def bank(self, constraints: list) -> int:
        """How much is met: constraints count as much as the longest one has tokens."""
        longest = max(len(way) for one in constraints for way in one.ways)
        rest = 0
        if self.begun is not None:
            own = max(len(way) for way in constraints[self.begun].ways)
            rest = longest - (own - len(self.tokens))
        return (len(constraints) - len(self.left)) * longest + rest


class Beam(NamedTuple):
    row: int
    token: int
    sum: float
    state: State


def spread(pool: list[Beam], constraints: list, size: int) -> list[Beam]:
    """The best of each bank, the fullest bank first, then the second best of each, up to `size`."""
    banks: dict[int, list[Beam]] = {}
    for beam in sorted(pool, key=lambda beam: -beam.sum):
        banks.setdefault(beam.state.bank(constraints), []).append(beam)
    ranked = [(place, -bank, beam) for bank, beams in banks.items() for place, beam in enumerate(beams)]
    return [beam for _, _, beam in sorted(ranked, key=lambda r: r[:2])[:size]]
