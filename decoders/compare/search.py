"""Which mistakes, put into our formula, give what a port gave?"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor

from . import mistakes
from .arithmetic import Arithmetic
from .formula import stages
from .kit import Kit
from .mistakes import Mistake
from .noise import BEYOND, DTYPES, compared, noise_of, spread, truth
from .report import Row
from .rows import in_units

Values = Mapping[str, Mapping[str, Tensor]]  # case -> stage -> value
# What mistakes may raise together: they find nothing to read, make other shapes, divide by nothing.
NOT_COMPUTED = (LookupError, RuntimeError, ArithmeticError)


class Search:
    """Which mistakes in our formula give the values of a port?"""

    def __init__(self, kit: Kit, values: Values, rows: list[Row], dtype: str):
        self.kit, self.dtype, self.rows = kit, dtype, rows
        self.lowered = {name: w.to(getattr(torch, dtype)) for name, w in kit.weights.items()}
        moved = {(row.case, row.stage) for row in rows if row.mark == "~"}
        self.values = {
            case: {name: value for name, value in found.items() if (case, name) not in moved}
            for case, found in values.items()
        }
        worst = {
            case: max((r.units for r in rows if r.case == case and r.mark == "x"), default=0.0)
            for case in values
        }
        small = {case: kit.inputs[case]["input_ids"].numel() for case in values}
        turns = {case: far_positions(kit.inputs[case]) for case in values}
        order = {case: (worst[case] == 0, turns[case], small[case]) for case in values}
        self.cases = sorted(values, key=lambda case: order[case])  # the plainest first, then the quickest
        self.focus, self.wrong = "plain" if worst.get("plain") else self.cases[0], worst
        self.coarse = BEYOND * (20 if dtype in ("bfloat16", "float16") else 1000)  # worth a closer look

    def only(self, cases: list[str]) -> "Search":
        """The same for some of the cases."""
        return Search(self.kit, {case: self.values[case] for case in cases}, self.rows, self.dtype)

    def stages(
        self,
        case: str,
        given: tuple[Mistake, ...],
        gradients: bool = False,
        note: Callable | None = None,
        do: Arithmetic | None = None,
    ) -> dict[str, Tensor]:
        """In float64; as the port computes with `do`, or where a mistake shows in half precision only."""
        lowered = do is not None or any(m.half for m in given)
        weights = self.lowered if lowered else self.kit.weights64
        inputs = self.kit.inputs[case]
        return stages(self.kit.config, weights, inputs, mistakes=given, do=do, gradients=gradients, note=note)

    def some_stages(
        self,
        case: str,
        given: tuple[Mistake, ...],
        wanted: Collection[str],
        own_inputs: bool = False,
        do: Arithmetic | None = None,
    ) -> dict[str, Tensor]:
        """Those that are `wanted`, NaN for padding; with `own_inputs` each out of what the port itself had
        before it. One of NOT_COMPUTED where the mistakes cannot be."""
        found: dict[str, Tensor] = {}

        def note(name: str, value: Tensor) -> Tensor:
            if name in wanted:
                found[name] = compared(name, value, self.kit.inputs[case])
                if len(found) == len(wanted):
                    raise Enough
            return self.theirs(case, name, value) if own_inputs else value

        with contextlib.suppress(Enough):
            self.stages(case, given, note=note, do=do)
        return found

    def theirs(self, case: str, name: str, value: Tensor) -> Tensor:
        """What the port had in the place of our value, as far as it was given and is a number."""
        theirs = self.values[case].get(name)
        if theirs is None:
            return value
        keep = self.kit.expected[case][name].isnan() | theirs.isnan()
        return torch.where(keep, value, theirs.to(value.dtype))

    def given_stages(self) -> dict[str, list[str]]:
        """Case -> the stages that the port gave, no gradients."""
        return {
            case: [name for name in self.values[case] if not name.startswith("grad.")] for case in self.cases
        }

    def far(self, case: str, name: str, value: Tensor) -> float:
        """Units between a value of ours and theirs; NaN where both have it is none."""
        exact = self.kit.expected[case].get(name)
        theirs = self.values[case].get(name)
        if exact is None or theirs is None or value.shape != exact.shape:
            return 0.0
        both = value.isnan() & theirs.isnan()
        ours = torch.where(exact.isnan() | both, torch.nan, value.double())
        if (ours.isnan() & ~exact.isnan() & ~both).any():
            return math.inf
        return in_units(spread(ours, theirs), self.kit.unit(case, name, self.dtype))

    def distance(self, given: tuple[Mistake, ...], most: float, cases: list[str]) -> float:
        """The worst of all stages; stops as soon as it is more than `most`."""
        worst = 0.0

        def hear(name: str, value: Tensor) -> None:
            nonlocal worst
            if name in self.values[case]:
                worst = max(worst, self.far(case, name, compared(name, value, self.kit.inputs[case])))
                if not worst <= most:
                    raise Enough

        for case in cases:
            try:
                self.stages(case, given, note=hear)
            except Enough:
                return math.inf
            except NOT_COMPUTED:
                return math.inf
        return worst

    def explaining(
        self, candidates: Iterable[tuple[Mistake, ...]], fall: float = 3
    ) -> list[tuple[float, tuple]]:
        """Those that leave noise only, and no more than a `fall`-th of what there was, the nearest first.
        Their noise is measured with the mistake in the formula; before that, whatever is far beyond the right
        formula's noise is left out."""
        found = []
        for given in candidates if any(self.wrong.values()) else ():
            if self.distance(given, self.coarse, self.cases) > self.coarse:
                continue
            units = self.precisely(given)
            if units <= min(BEYOND, max(self.wrong.values()) / fall):  # less is no explanation
                found.append((units, given))
        best = min((units for units, _ in found), default=0.0)  # of equals the table's first
        return sorted(found, key=lambda one: (len(one[1]), one[0] > 1.5 * best))

    def precisely(self, given: tuple[Mistake, ...]) -> float:
        """The distance in units of the noise that the formula has with these mistakes; gradients too."""
        worst = 0.0
        for case in self.cases:
            inputs, theirs = self.kit.inputs[case], self.values[case]
            gradients = any(name.startswith("grad.") for name in theirs)
            if any(m.half for m in given):
                ours = self.stages(case, given, gradients)
                ours = {name: compared(name, value, inputs).double() for name, value in ours.items()}
                noise = {name: self.kit.noise[case][name] for name in theirs}
                row = DTYPES.index(self.dtype)
            else:
                ours = truth(self.kit.config, self.kit.weights64, inputs, gradients, mistakes=given)
                kept = {name: value for name, value in ours.items() if name in theirs}
                noise = noise_of(
                    self.kit.config, self.kit.weights, inputs, kept, [self.dtype], gradients, given
                )
                row = 0
            for name, theirs_value in theirs.items():
                if name not in ours or name not in noise:
                    return math.inf
                expected = self.kit.expected[case][name]
                value = torch.where(expected.isnan(), torch.nan, ours[name])
                both = value.isnan() & theirs_value.isnan()
                if (value.isnan() != expected.isnan()).logical_and(~both).any():
                    return math.inf
                worst = max(worst, in_units(spread(value, theirs_value), tuple(noise[name][row].tolist())))
                if worst > BEYOND:
                    return math.inf
        return worst

    def roundings(self) -> list[str]:
        """What stays within the noise but is not rounded where we round: seen where a stage and what it is
        made of were given, bit by bit."""
        found, right = [], self.unlike(())
        for m in mistakes.of(self.kit.family):
            if not m.rounds:
                continue
            before, after = (
                sum(bits.get(stage, (0, 0))[0] for stage in m.rounds) for bits in (right, self.unlike((m,)))
            )
            count = sum(right.get(stage, (0, 0))[1] for stage in m.rounds)
            if count and before > 0.05 * count and after < 0.2 * before:
                found.append(
                    f"Within the noise, but rounded elsewhere: {m.name}. {before / count:.0%} of "
                    f"{', '.join(m.rounds)} differ in the last bit from what their own inputs give, "
                    f"with this {after / count:.1%}; to agree bit by bit: {m.fix}."
                )
        return found

    def unlike(self, given: tuple[Mistake, ...]) -> dict[str, tuple[int, int]]:
        """Stage, without its layer -> (numbers that differ from what their own inputs give in the port's
        precision, numbers compared)."""
        found: dict[str, tuple[int, int]] = {}
        for case in self.cases:
            theirs, exact = self.values[case], self.kit.expected[case]

            def hear(name: str, value: Tensor, theirs=theirs, exact=exact) -> Tensor:
                if name not in theirs:
                    return value
                own, keep = theirs[name].to(value.dtype), ~exact[name].isnan()
                stage = name.rpartition(".")[2]
                bad, n = found.get(stage, (0, 0))
                found[stage] = bad + int((own != value)[keep].sum()), n + int(keep.sum())
                return torch.where(keep & ~own.isnan(), own, value)

            stages(self.kit.config, self.lowered, self.kit.inputs[case], mistakes=given, note=hear)
        return found

    def pairs(self, known: list[Mistake]) -> Iterable[tuple[Mistake, ...]]:
        """Two at a time. One that does not show in a case is no news there, so that few have to be tried."""
        focus, right = [self.focus], self.stages(self.focus, ())
        shows = {m: not self.silent(m, right) for m in known}
        alone = {m: self.distance((m,), self.coarse, focus) <= self.coarse for m in known if shows[m]}
        for a, b in combinations(known, 2):
            if shows[a] and shows[b]:
                if a.steps.keys() == b.steps.keys() and "act" in a.steps:
                    continue
                if self.distance((a, b), self.coarse, focus) <= self.coarse:
                    yield a, b
            elif alone.get(a) or alone.get(b):
                yield a, b

    def silent(self, m: Mistake, right: dict[str, Tensor]) -> bool:
        """Whether a mistake changes nothing in the case that is looked at first."""
        wrong = self.stages(self.focus, (m,))
        return all(
            name in wrong
            and torch.equal(torch.nan_to_num(value.double()), torch.nan_to_num(wrong[name].double()))
            for name, value in right.items()
            if name in self.values[self.focus]
        )


def far_positions(inputs: Mapping[str, Tensor]) -> bool:
    """Whether positions lie far from 0. A rotation has turned so often there that angles far from the right
    ones are near again, and a search goes astray."""
    position_ids = inputs.get("position_ids")
    return position_ids is not None and int(position_ids.max()) > 10 * position_ids.shape[1]


class Enough(Exception):
    """No need to compute the rest."""
