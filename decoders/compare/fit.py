"""Which number of a port is another than this model's, and what it is there.

A quantity (`mistakes/numbers.py`) is put into the formula with one value after another, until what comes out
is what the port gave: first on a grid, by one stage, then by Gauss-Newton steps, in the end by all that was
given. Several numbers of a port move together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .arithmetic import Arithmetic
from .formula import Formula, stage_order
from .mistakes import Mistake, Quantity, quantities_of
from .noise import WAYS
from .search import NOT_COMPUTED, Search

STEP = 1e-5  # of a coordinate, for a derivative
BEST = 6  # of the numbers that explain a stage, so many are tried with all that was given
Where = Mapping[str, Sequence[str]]  # case -> stages
Place = tuple[str, str]  # case, stage

# ---- One number --------------------------------------------------------------------------------------------


def candidates(search: Search) -> list[tuple[Mistake, ...]]:
    """A mistake with a number in it that may explain what a port gave, the likeliest first."""
    place = first_difference(search)
    if place is None:
        return []
    fits = []
    for m in fits_at(search, (), place):
        fit = Fit(search, (m,), search.given_stages())
        fit.improve(steps=4)
        fits.append(fit)
    fits = sorted((fit for fit in fits if fit.size <= search.coarse), key=lambda fit: fit.size)
    return [given for fit in fits[:BEST] if (given := fit.with_errors()) is not None]


def first_difference(search: Search) -> Place | None:
    """Case and stage by which values are tried first: the first that is wrong, no gradient."""
    stages = [
        row.stage
        for row in search.rows
        if row.mark == "x" and row.case == search.focus and row.stage in search.values.get(row.case, {})
    ]
    stages = [stage for stage in stages if not stage.startswith("grad.")]
    return (search.focus, min(stages, key=stage_order)) if stages else None


def fits_at(
    search: Search, given: tuple[Mistake, ...], place: Place, own_inputs: bool = False
) -> list[Mistake]:
    """Mistakes with a number that, beside those `given`, bring a stage near to what the port gave there."""
    f = Formula(search.kit.config, {})
    taken = {m.quantity for m in given}
    found: list[Mistake] = []
    for quantity in quantities_of(search.kit.family):
        if quantity not in taken and quantity.fits(f):
            found += values_at(search, given, place, own_inputs, quantity, f)
    return found


def values_at(
    search: Search,
    given: tuple[Mistake, ...],
    place: Place,
    own_inputs: bool,
    quantity: Quantity,
    f: Formula,
) -> list[Mistake]:
    """The best value of a quantity at one stage, of whole numbers all that bring it near; none if all are far
    off."""
    where = {place[0]: [place[1]]}
    tries = [quantity.mistake(f, value) for value in quantity.guesses(f)]
    fits = [Fit(search, (*given, m), where, [m], own_inputs) for m in tries]
    some = {fit.size for fit in (fits[0], fits[len(fits) // 2], fits[-1])} if fits else {0.0}
    if len(some) == 1:  # it changes nothing there
        return []
    if quantity.moves:
        fits = [min(fits, key=lambda fit: fit.size)]
        fits[0].improve()
    return [fit.given[-1] for fit in fits if fit.size <= search.coarse]


# ---- One beside other mistakes -----------------------------------------------------------------------------


def at_stage(
    search: Search, given: tuple[Mistake, ...], place: Place, wrong: Iterable[Place]
) -> list[Mistake]:
    """Mistakes with a number that explain a stage out of what the port itself had before it; fitted by the
    `wrong` stages of that kind, in other layers and cases, that they bring near."""
    kind, found = place[1].rpartition(".")[2], []
    alike = [one for one in wrong if one[1].rpartition(".")[2] == kind]
    for m in fits_at(search, given, place, own_inputs=True):
        where = near(search, (*given, m), alike) or {place[0]: [place[1]]}
        fit = Fit(search, (*given, m), where, [m], own_inputs=True)
        fit.improve(steps=4)
        found.append(fit.given[-1])
    return found


def near(search: Search, given: tuple[Mistake, ...], wrong: Iterable[Place]) -> dict[str, list[str]]:
    """Those of the `wrong` stages that these mistakes may explain."""
    where: dict[str, list[str]] = {}
    for case, stage in sorted(wrong):
        where.setdefault(case, []).append(stage)
    found: dict[str, list[str]] = {}
    for case, stages in where.items():
        off = differences(search, given, {case: stages}, own_inputs=True) or {}
        for place, difference in off.items():
            if size(difference) <= search.coarse:
                found.setdefault(case, []).append(place[1])
    return found


def together(search: Search, given: tuple[Mistake, ...]) -> tuple[Mistake, ...] | None:
    """The numbers in several mistakes once more, by all that was given; None if one of them is right."""
    fit = Fit(search, given, search.given_stages())
    fit.improve(steps=4)
    return fit.with_errors()


# ---- The fit -----------------------------------------------------------------------------------------------


def differences(
    search: Search,
    given: tuple[Mistake, ...],
    where: Where,
    own_inputs: bool = False,
    do: Arithmetic | None = None,
) -> dict[Place, Tensor] | None:
    """What the formula with mistakes gives, less what the port gave, in units of typical noise: of each stage
    the numbers that count. None where it cannot be computed, or is not finite."""
    found: dict[Place, Tensor] = {}
    try:
        for case, names in where.items():
            for name, value in search.some_stages(case, given, names, own_inputs, do).items():
                theirs = search.values[case][name]
                off = torch.where(value.isnan() & theirs.isnan(), 0.0, value.double() - theirs)
                unit = max(search.kit.unit(case, name, search.dtype)[1], 1e-300)
                found[case, name] = off[~search.kit.expected[case][name].isnan()] / unit
    except NOT_COMPUTED:
        return None
    return found if found and all(bool(d.isfinite().all()) for d in found.values()) else None


def size(difference: Tensor | None) -> float:
    """Root mean square; infinity where there is nothing."""
    return math.inf if difference is None else difference.square().mean().sqrt().item()


class Fit:
    """Numbers in mistakes, moved until the formula gives what a port gave.

    `given` are all mistakes in the formula, `moved` those of them whose numbers are sought, by default each
    that has one which is not whole. They are moved in their coordinates `t`, (P,). N are the numbers of the
    stages by which they are judged, `where`; with `own_inputs` each stage out of what the port had before it.
    """

    def __init__(
        self,
        search: Search,
        given: tuple[Mistake, ...],
        where: Where,
        moved: Sequence[Mistake] | None = None,
        own_inputs: bool = False,
    ):
        self.search, self.given, self.where, self.own_inputs = search, given, where, own_inputs
        self.f = Formula(search.kit.config, {})
        sought = given if moved is None else moved
        self.moved = [i for i, m in enumerate(given) if m in sought and m.quantity and m.quantity.moves]
        self.quantities = [given[i].quantity for i in self.moved]
        self.spacing = torch.tensor([q.spacing for q in self.quantities], dtype=torch.float64)
        start = [given[i].quantity.coordinate(given[i].number) for i in self.moved]
        self.t = torch.tensor(start, dtype=torch.float64)
        self._size: float | None = None

    @property
    def size(self) -> float:
        """Root mean square of what is left, in units of noise."""
        if self._size is None:
            self._size = size(self.residual(self.t))
        return self._size

    def mistakes(self, t: Tensor, errors: Sequence[float] | None = None) -> tuple[Mistake, ...]:
        """All that are given, with these numbers."""
        found = list(self.given)
        for n, (i, quantity) in enumerate(zip(self.moved, self.quantities, strict=True)):
            error = 0.0 if errors is None else errors[n]
            found[i] = quantity.mistake(self.f, quantity.value(t[n].item()), error)
        return tuple(found)

    def residual(self, t: Tensor, do: Arithmetic | None = None) -> Tensor | None:
        """(N,); None where it cannot be computed."""
        found = differences(self.search, self.mistakes(t), self.where, self.own_inputs, do)
        return None if found is None else torch.cat(list(found.values()))

    def slope(self, t: Tensor) -> Tensor | None:
        """(N, P), how the residual changes with each coordinate; None if one of them changes nothing."""
        columns = []
        for step in STEP * torch.eye(len(t), dtype=torch.float64):
            ahead, behind = self.residual(t + step), self.residual(t - step)
            if ahead is None or behind is None or torch.equal(ahead, behind):
                return None
            columns.append((ahead - behind) / (2 * STEP))
        return torch.stack(columns, dim=1)

    def improve(self, steps: int = 12) -> None:
        """Gauss-Newton steps, until one changes nothing that rounding would not hide."""
        for _ in range(steps if self.moved else 0):
            if not self.step():
                break
        self.given = self.mistakes(self.t)

    def step(self) -> bool:
        """One step, shortened where it leads away, never longer than from guess to guess. False if there is
        none."""
        now, slope = self.residual(self.t), self.slope(self.t)
        if now is None or slope is None:
            return False
        move = -torch.linalg.lstsq(slope, now[:, None]).solution[:, 0]
        move = move * (self.spacing / move.abs().clamp(min=1e-300)).min().clamp(max=1.0)
        least = 0.01 * max(1.0, size(now))  # a hundredth of what independent noise makes uncertain
        while (slope @ move).norm() > least:
            after = size(self.residual(self.t + move))
            if after < size(now):
                self.t, self._size = self.t + move, after
                return True
            move = move / 4
        return False

    # How far a number may be off

    def with_errors(self) -> tuple[Mistake, ...] | None:
        """The mistakes, each number with what it may be off; None if one is right, or changes nothing."""
        if not self.moved:
            return self.given
        deviations = self.deviations()
        if deviations is None:
            return None
        errors = []
        for t, error, quantity in zip(self.t, deviations.amax(0), self.quantities, strict=True):
            value, right = quantity.value(t.item()), quantity.right(self.f)
            errors.append(error.item() * (value if quantity.grid == "log" else 1.0))
            if right is not None and abs(value - right) <= errors[-1]:
                return None
        return self.mistakes(self.t, errors)

    def deviations(self) -> Tensor | None:
        """(4, P): half of a 95 % interval around each coordinate, in four ways; the largest is the error.

        Independent noise is not enough. Rounding is alike in all numbers of a token, which goes through every
        layer, and in tokens of a sequence, which read each other: so what is left is also added up by tokens
        and by sequences before it is squared (a clustered "sandwich" estimate). What moves all of them alike,
        as a rounded table of cos and sin does, leaves nothing behind: so the formula is also computed as the
        port's precision does it, in several orders, to see how far that moves the numbers.
        """
        found, slope = differences(self.search, self.given, self.where, self.own_inputs), self.slope(self.t)
        if found is None or slope is None:
            return None
        left, influence = torch.cat(list(found.values())), torch.linalg.pinv(slope)  # (N,), (P, N)
        tokens, sequences = groups(self.search, found)
        return torch.stack(
            [
                2.0 * max(1.0, size(left)) * influence.square().sum(1).sqrt(),
                2.0 * in_groups(influence * left, tokens),
                2.3 * in_groups(influence * left, sequences),  # there are about ten
                3.0 * self.by_rounding(left, slope, influence),  # of five or six, and others round otherwise
            ]
        )

    def by_rounding(self, left: Tensor, slope: Tensor, influence: Tensor) -> Tensor:
        """(P,) standard deviation of the numbers, where the formula itself is computed as the port does. Each
        time with numbers a little aside, which that precision may round to the same."""
        ways, moved = WAYS[self.search.dtype], []
        for way, share in zip(ways, torch.linspace(-1, 1, len(ways), dtype=torch.float64), strict=True):
            aside = share * torch.finfo(getattr(torch, self.search.dtype)).eps * self.scale
            rounded = self.residual(self.t + aside, way)
            if rounded is not None:
                moved.append(influence @ (rounded - left - slope @ aside))
        return torch.stack(moved).square().mean(0).sqrt() if moved else torch.zeros_like(self.t)

    @property
    def scale(self) -> Tensor:
        """(P,) By how much a coordinate grows where its number grows by as much as it is large."""
        sizes = [1.0 if q.grid == "log" else t.abs() for t, q in zip(self.t, self.quantities, strict=True)]
        return torch.tensor(sizes, dtype=torch.float64)


def groups(search: Search, places: Iterable[Place]) -> tuple[Tensor, Tensor]:
    """Of each number of stages its token and its sequence, counted through all cases, (N,) each. A loss is a
    token for itself."""
    tokens, sequences, first = [], [], {}
    count = 0
    for case, name in places:
        B, T = search.kit.inputs[case]["input_ids"].shape
        if case not in first:
            first[case], count = count, count + B * T + 1
        expected = search.kit.expected[case][name]
        if expected.dim() == 0:
            of_token = of_sequence = torch.tensor(B * T)
        else:  # (B, ..., T, features)
            row = torch.arange(B).view(B, *[1] * (expected.dim() - 1)) * T
            of_sequence = row.expand(expected.shape)
            of_token = of_sequence + torch.arange(T)[:, None]
        seen = ~expected.isnan()
        tokens.append(first[case] + of_token[seen])
        sequences.append(first[case] + of_sequence[seen])
    return torch.cat(tokens), torch.cat(sequences)


def in_groups(parts: Tensor, group: Tensor) -> Tensor:
    """(P,) standard deviation of the sum of `parts`, (P, N), where those of a group go together."""
    sums = parts.new_zeros(len(parts), int(group.max()) + 1).index_add_(1, group, parts)
    count = len(group.unique())
    return (sums.square().sum(1) * count / max(1, count - 1)).sqrt()
