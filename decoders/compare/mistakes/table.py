"""The table itself: what a mistake is, and the list of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..formula import Formula

Step = Callable[[Formula, Any], Any]
ALL = "gpt_neo openai-gpt phi phi3 persimmon fuyu"
LEARNED, ROTARY, PERSIMMON = "gpt_neo openai-gpt", "phi phi3 persimmon fuyu", "persimmon fuyu"


@dataclass(frozen=True, eq=False)
class Mistake:
    name: str  # a sentence: what the port does
    fix: str  # what it should do
    families: tuple[str, ...]
    steps: dict[str, Step]
    half: bool = False  # shows in half precision only
    rounds: tuple[str, ...] = ()  # within the noise, but these stages are not what their own inputs give
    number: float | None = None  # of a mistake with a number in it: the port's, as it was fitted
    error: float = 0.0  # how far it may be off
    quantity: Any = None  # of numbers.py, what it is a number of

    def into(self, right: Formula) -> None:
        for step, change in self.steps.items():
            setattr(right, step, change(right, getattr(right, step)))


MISTAKES: list[Mistake] = []


def mistake(families: str, name: str, fix: str, half: bool = False, rounds: str = "", **steps: Step) -> None:
    MISTAKES.append(Mistake(name, fix, tuple(families.split()), steps, half, tuple(rounds.split())))


def of(family: str) -> list[Mistake]:
    return [known for known in MISTAKES if family in known.families]


def without(families: str, *others: str) -> str:
    return " ".join(name for name in families.split() if name not in others)
