"""Which number of a port is another than this model's, and what it is there.

A quantity (`mistakes/numbers.py`) is put into the formula with one value after another, until what comes out
is what the port gave: first on a grid, by the first stage that differs, then by Gauss-Newton steps, in the
end by all that was given. How far the answer may be off follows from the noise and from how much the stages
change with the value.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .formula import Formula, stage_order
from .mistakes import Mistake, Quantity, quantities_of
from .noise import compared
from .search import Search

STEP = 1e-5  # of a value, or of its logarithm, for a derivative
SURE = 2.0  # standard deviations


class Reached(Exception):
    """All stages that are needed are computed."""


class Fitted(NamedTuple):
    mistake: Mistake
    units: float  # root mean square of what is left, in units of noise


def candidates(search: Search) -> list[tuple[Mistake]]:
    """Mistakes with a fitted number that may explain what a port gave, the likeliest first."""
    f = Formula(search.kit.config, {})
    first = first_difference(search)
    if first is None:
        return []
    fitted = []
    for quantity in quantities_of(search.kit.family):
        if quantity.grid == "whole":
            fitted += whole_numbers(search, quantity, f, first)
        elif (one := Fit(search, quantity, f).run(first)) is not None:
            fitted.append(one)
    fitted = [one for one in fitted if one.units <= search.coarse]
    return [(one.mistake,) for one in sorted(fitted, key=lambda one: one.units)[:6]]


def first_difference(search: Search) -> tuple[str, str] | None:
    """Case and stage by which values are tried first: the first that is wrong, no gradient."""
    rows = [
        row
        for row in search.rows
        if row.mark == "x" and row.stage in search.values.get(row.case, {}) and row.case == search.focus
    ]
    stages = [row.stage for row in rows if not row.stage.startswith("grad.")]
    return (search.focus, min(stages, key=stage_order)) if stages else None


def residual(
    search: Search, mistakes: tuple[Mistake, ...], case: str, last: str | None = None
) -> Tensor | None:
    """What the formula with mistakes gives, less what the port gave, in units of typical noise: of one stage,
    or of all that were given. None where it cannot be computed, or is not finite."""
    theirs, parts = search.values[case], []
    wanted = {last} if last else {name for name in theirs if not name.startswith("grad.")}

    def note(name: str, value: Tensor) -> None:
        if name in wanted:
            exact = search.kit.expected[case][name]
            seen = ~exact.isnan()
            ours = compared(name, value, search.kit.inputs[case])
            unit = search.kit.unit(case, name, search.dtype)[1]
            parts.append(((ours.double() - theirs[name])[seen] / max(unit, 1e-300)).flatten())
        if name == last:
            raise Reached

    try:
        search.stages(case, mistakes, note=note)
    except Reached:
        pass
    except (IndexError, RuntimeError):  # a mistake that finds nothing to read, or another shape
        return None
    found = torch.cat(parts) if parts else None
    return found if found is not None and bool(found.isfinite().all()) else None


def size(difference: Tensor | None) -> float:
    """Root mean square; infinity where there is nothing."""
    return math.inf if difference is None else difference.square().mean().sqrt().item()


def whole_numbers(search: Search, quantity: Quantity, f: Formula, first: tuple[str, str]) -> list[Fitted]:
    """Every value is tried: there are few."""
    if quantity.right(f) is None:
        return []
    fitted = []
    for value in quantity.guesses(f):
        mistake = quantity.mistake(f, value)
        fitted.append(Fitted(mistake, size(residual(search, (mistake,), *first))))
    return fitted


class Fit:
    """A search of one quantity's value. It is moved in `t`, its logarithm where the grid is one of them."""

    def __init__(self, search: Search, quantity: Quantity, f: Formula):
        self.search, self.quantity, self.f = search, quantity, f
        self.log = quantity.grid == "log"

    def value(self, t: float) -> float:
        return math.exp(t) if self.log else t

    def run(self, first: tuple[str, str]) -> Fitted | None:
        """None for a quantity that this model does not have, or that changes nothing here."""
        right = self.quantity.right(self.f)
        if right is None and self.quantity.name.startswith(("activation", "longrope")):
            return None
        guesses = self.quantity.guesses(self.f)
        points = [math.log(v) if self.log else v for v in guesses]
        sizes = [size(self.residual(t, [first])) for t in points]
        t = points[sizes.index(min(sizes))]
        if not math.isfinite(min(sizes)) or max(x for x in sizes if math.isfinite(x)) == min(sizes):
            return None
        limit = abs(points[1] - points[0])
        t = self.improved(t, [first], limit)
        if size(self.residual(t, [first])) > self.search.coarse:
            return Fitted(self.quantity.mistake(self.f, self.value(t)), math.inf)
        every: list[tuple[str, str | None]] = [(case, None) for case in self.search.cases]
        t = self.improved(t, every, limit, steps=4)
        error = self.error(t, every)
        if not math.isfinite(error) or (right is not None and abs(self.value(t) - right) <= 2 * error):
            return None  # it changes nothing, or it is right
        mistake = self.quantity.mistake(self.f, self.value(t), error)
        return Fitted(mistake, size(self.residual(t, every)))

    def residual(self, t: float, where: list) -> Tensor | None:
        mistake = self.quantity.mistake(self.f, self.value(t))
        parts = [residual(self.search, (mistake,), case, last) for case, last in where]
        return None if any(part is None for part in parts) else torch.cat(parts)

    def slope(self, t: float, where: list) -> Tensor | None:
        ahead, behind = self.residual(t + STEP, where), self.residual(t - STEP, where)
        return None if ahead is None or behind is None else (ahead - behind) / (2 * STEP)

    def improved(self, t: float, where: list, limit: float, steps: int = 12) -> float:
        """Gauss-Newton steps, halved where they lead away; none is longer than `limit`."""
        now = self.residual(t, where)
        for _ in range(steps):
            slope = self.slope(t, where)
            if now is None or slope is None or not slope.square().sum():
                break
            move = -((slope @ now) / (slope @ slope)).item()
            move = max(-limit, min(limit, move))
            while abs(move) > 1e-12 and size(self.residual(t + move, where)) >= size(now):
                move /= 4
            if abs(move) <= 1e-12:
                break
            t, now = t + move, self.residual(t + move, where)
        return t

    def error(self, t: float, where: list) -> float:
        """How far the value may be off, from the noise of all numbers that depend on it."""
        slope = self.slope(t, where)
        if slope is None or not slope.square().sum():
            return math.inf
        deviation = SURE * max(1.0, size(self.residual(t, where))) / slope.square().sum().sqrt().item()
        return deviation * self.value(t) if self.log else deviation
