"""Where does a port differ, by how much more than rounding, and what is the mistake?

    report = run("KIT", port)       # a file of values, a dict, a function, a module, "transformers"
    assert report.equal, report     # prints as a table

Every stage is measured in units of the noise that a kit brings along: what correct arithmetic of that
precision may be off. Where something differs, the mistakes of `mistakes.py` are tried: one, several of which
each shows in a stage of its own, two at once. A name is given only if our formula, with these mistakes in it,
gives all that the port gave, within the noise.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import mistakes, ports
from .formula import place, stages
from .kit import BEYOND, DTYPES, Kit, compared, make, noise_of, spread, truth
from .likeness import likeness
from .mistakes import Mistake

__all__ = ["Finding", "Kit", "Report", "Row", "make", "run"]

# ---- Report ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    case: str
    stage: str
    largest: float  # difference
    typical: float  # root mean square
    units: float  # how many times the noise, the worse of both
    mark: str  # "=" within the noise, "x" beyond, "~" beyond, but what is computed of it agrees
    seen: str = ""  # where in the port it was found, if not by name


@dataclass
class Finding:
    """What explains the difference: with `mistakes` our formula equals the port, to `units` of noise."""

    mistakes: tuple[Mistake, ...]
    units: float
    before: float
    values: int  # how many numbers were compared
    alike: list[tuple[Mistake, ...]] = field(default_factory=list)  # what was given does not tell them apart
    cases: list[str] = field(default_factory=list)  # only these are explained; empty: all

    def __str__(self) -> str:
        told = " and ".join(m.name for m in self.mistakes)
        what = "this mistake" if len(self.mistakes) == 1 else "these mistakes"
        where = f" in {', '.join(self.cases)} (more is wrong in the others)" if self.cases else ""
        lines = [f"Your port equals ours with {what}{where}, to {self.units:.1f}x noise: {told}."]
        lines += [f"  fix: {m.fix}" for m in self.mistakes]
        fall = f"{human(self.before)}x to {self.units:.1f}x noise"
        lines.append(
            f"  sure: {self.values:,} numbers fall from {fall}"
            + ("; nothing else that is known does that" if not self.alike else "")
        )
        lines += [
            f"  not told apart by what was given: {' and '.join(m.name for m in other)}"
            for other in self.alike[:3]
        ]
        return "\n".join(lines)


@dataclass
class Report:
    kit: str
    theirs: str
    dtype: str
    rows: list[Row]
    remarks: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    likeness: list[str] = field(default_factory=list)  # what the difference looks like, if it has no name
    roundings: list[str] = field(default_factory=list)  # within the noise, but rounded elsewhere
    unsteady: bool = False  # two runs of the port differ

    @property
    def first(self) -> Row | None:
        """The first stage beyond the noise, in the order of the computation; of several cases the first."""
        wrong = [row for row in self.rows if row.mark == "x"]
        return min(wrong, key=lambda row: place(row.stage)) if wrong else None

    @property
    def equal(self) -> bool:
        return self.first is None and not self.unsteady

    @property
    def sentence(self) -> str:
        if self.first is None:
            told = f"{self.theirs} computes what {self.kit} expects, to {self.worst:.1f}x {self.dtype} noise"
            return told + (", but not twice the same." if self.unsteady else ".")
        row = self.first
        wrong = [r.case for r in self.rows if r.mark == "x" and r.stage == row.stage]
        every = len(wrong) == len({r.case for r in self.rows if r.stage == row.stage})
        where = f"case{'s' * (len(wrong) > 1)} {', '.join(wrong)}"
        where = "every case" if every and len(wrong) > 1 else where
        before = [
            r for r in self.rows if r.mark == "=" and r.case == row.case and place(r.stage) < place(row.stage)
        ]
        what = f"is {human(row.units)}x {self.dtype} noise off"
        what = "has NaN or infinity" if math.isinf(row.units) else what
        told = f"First difference: {row.stage} in {where} {what}"
        if before:
            return f"{told}; the last that agrees before it is {before[-1].stage}."
        return told + ("." if row.stage == "embeddings" else "; nothing before it was given.")

    @property
    def worst(self) -> float:
        return max((row.units for row in self.rows if row.mark == "="), default=0.0)

    def as_json(self) -> dict:
        return {
            "equal": self.equal, "kit": self.kit, "theirs": self.theirs, "dtype": self.dtype,
            "first": None if self.first is None else {"case": self.first.case, "stage": self.first.stage},
            "sentence": self.sentence, "unsteady": self.unsteady,
            "mistakes": [{"names": [m.name for m in f.mistakes], "fixes": [m.fix for m in f.mistakes],
                          "units": f.units, "before": finite(f.before), "values": f.values, "cases": f.cases,
                          "alike": [[m.name for m in other] for other in f.alike]} for f in self.findings],
            "likeness": self.likeness, "roundings": self.roundings, "remarks": self.remarks,
            "rows": [{**row._asdict(), **{key: finite(getattr(row, key)) for key in
                                          ("largest", "typical", "units")}} for row in self.rows],
        }  # fmt: skip

    def __str__(self) -> str:
        return "\n" + self.told()  # below pytest's own line

    def told(self, wide: bool = False) -> str:
        """The answer, and behind it the table; `wide`: every stage of every case."""
        parts = [self.sentence, *map(str, self.findings), *self.likeness, *self.roundings, *self.remarks]
        return "\n".join([*parts, "", *self.table(wide)])

    def table(self, wide: bool = False) -> Iterable[str]:
        """Every stage of the case with the first difference (`wide`: of all), one line of the others."""
        width = max([len(row.stage) for row in self.rows] + [5])
        for case in dict.fromkeys(row.case for row in self.rows):
            own = [row for row in self.rows if row.case == case]
            worst, wrong = max(own, key=lambda row: row.units), [row for row in own if row.mark == "x"]
            told = f"{case:{width}} {len(own):4} stages, the worst {worst.stage} at {human(worst.units)}x"
            if wide or (self.first is not None and case == self.first.case):
                yield f"  {case:{width}} {'largest':>9} {'typical':>9} {'x noise':>8}"
                yield from self.every(own, width, wide)
            elif wrong:
                yield f"x {told}, from {min(wrong, key=lambda row: place(row.stage)).stage} on"
            else:
                yield f"= {told}"

    def every(self, own: list[Row], width: int, wide: bool) -> Iterable[str]:
        """A line for each stage; gradients in one, where they are many."""
        grads = [row for row in own if row.stage.startswith("grad.")]
        for row in own if wide else [row for row in own if row not in grads]:
            told = f"{row.largest:9.1e} {row.typical:9.1e} {human(row.units):>8}"
            yield f"{row.mark} {row.stage:{width}} {told}" + (f"  {row.seen}" if row.seen else "")
        if grads and not wide:
            bad, worst = [row for row in grads if row.mark == "x"], max(grads, key=lambda row: row.units)
            yield (
                f"{'x' if bad else '='} {len(grads)} gradients, {len(bad)} beyond the noise, the worst "
                f"{worst.stage} at {human(worst.units)}x"
            )


def finite(x: float) -> float | str:
    """JSON has no infinity."""
    return x if math.isfinite(x) else str(x)


def human(x: float) -> str:
    """Example: 1.23, 12.3, 123, 1.2e+04"""
    return "NaN" if math.isinf(x) else f"{x:.3g}" if x < 1000 else f"{x:.1e}"


# ---- Measuring ---------------------------------------------------------------------------------------------

Values = Mapping[str, Mapping[str, Tensor]]  # case -> stage -> value


def run(
    kit: str | Path | Kit,
    theirs: Any,
    *,
    dtype: str | None = None,
    cases: Iterable[str] | None = None,
    names: bool = True,
) -> Report:
    """Compare what a port computes with what a kit expects.

    `theirs`: a safetensors or npz file, or a dict, with `CASE/STAGE` of what the port can give; a function
    `(config: dict, weights: dict) -> callable(input_ids, **inputs)`, itself or as "module:function" or
    "file.py:function"; such a callable or module is looked into by hooks; or "transformers". `dtype` is
    what the port computes in: of values by default what they look like, else float32. `names=False` looks
    for no mistake. ValueError or OSError with one sentence for what cannot be compared; what the port
    itself raises becomes `ports.PortError`.
    """
    kit = kit if isinstance(kit, Kit) else Kit(kit)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    chosen = list(kit.expected if cases is None else cases)
    if unknown := [case for case in chosen if case not in kit.expected]:
        raise ValueError(f"{kit.folder} has no case {unknown[0]}: {', '.join(kit.expected)}")
    got = ports.values_of(kit, theirs, dtype, chosen)
    rows, values = [], {}
    for case in [name for name in kit.inputs if name in got.values]:
        values[case] = {
            name: fitted(kit, case, name, got.values[case][name])
            for name in sorted(got.values[case], key=place)
            if name in kit.expected[case]
        }
        rows += marked(
            [
                measured(kit, case, name, value, got.dtype, got.seen.get((case, name), ""))
                for name, value in values[case].items()
            ],
            kit.family == "phi",
        )
    if not rows:
        raise ValueError(
            f"{got.name} holds no stage of this kit: name them {chosen[0]}/logits, "
            f"{chosen[0]}/layers.0.out ..., as KIT.md says"
        )
    name = kit.folder.name or str(kit.folder)
    report = Report(name, got.name, got.dtype, rows, got.remarks, unsteady=got.unsteady)
    if names and got.dtype in ("bfloat16", "float16"):
        report.roundings = Search(kit, values, rows, got.dtype).roundings()
    if report.first is not None and names:
        report.findings = named(kit, values, rows, got.dtype)
        if not report.findings:
            first, n = report.first, len(mistakes.of(kit.family))
            report.likeness = [
                f"None of {n} known mistakes, and no two of them, explain it. The more "
                "inner values a port gives (KIT.md), the more mistakes can be told apart."
            ]
            tolerance = kit.unit(first.case, first.stage, got.dtype)[0] * BEYOND
            report.likeness += likeness(
                kit.expected[first.case][first.stage],
                values[first.case][first.stage],
                tolerance,
                first.stage,
                kit.inputs[first.case],
            )
    return report


def fitted(kit: Kit, case: str, name: str, value: Tensor) -> Tensor:
    """Their value in our shape, in float64. ValueError, with the likely reason, where it cannot be."""
    wanted = kit.expected[case][name]
    found = ports.arranged(value.double(), wanted)
    if found is not None:
        return found
    shape, theirs = tuple(wanted.shape), tuple(value.shape)
    reason = ""
    if sorted(shape) == sorted(theirs):
        reason = ": transposed?"
    elif len(shape) == 3 and theirs[-1:] == shape[2:] and math.prod(theirs) <= shape[0] * shape[2]:
        reason = ": of the last token only? give all of them"
    elif len(shape) == 3 and len(theirs) == 3 and theirs[:2] == shape[:2] and theirs[2] > shape[2]:
        reason = ": a vocabulary padded to a round size? cut it off"
    elif case == "cached" and len(shape) > 1 and math.prod(theirs) > math.prod(shape):
        reason = ": with the tokens of past_ids? give those of input_ids only"
    elif len(theirs) and theirs[0] == 1 and shape and shape[0] > 1:
        reason = ": one row only? the case has several"
    raise ValueError(f"{case}/{name} is {theirs}, the kit has {shape}{reason}")


def measured(kit: Kit, case: str, name: str, value: Tensor, dtype: str, seen: str = "") -> Row:
    largest, typical = spread(kit.expected[case][name], value)
    units = in_units((largest, typical), kit.unit(case, name, dtype))
    return Row(case, name, largest, typical, units, "", seen)


def in_units(difference: tuple[float, float], unit: tuple[float, float]) -> float:
    return max(d / u if u else (math.inf if d else 0.0) for d, u in zip(difference, unit, strict=True))


TOGETHER = ("q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated")  # none is made of all others


def marked(rows: list[Row], side_by_side: bool = False) -> list[Row]:
    """Of one case: "x" beyond the noise, or "~" if the next stage made of it agrees: then the port calls
    something else so, or keeps it in another order, which is no mistake. `side_by_side`: the MLP reads
    nothing of attention."""
    found: list[Row] = []  # from the last stage to the first
    for row in reversed(rows):
        mark = "=" if row.units <= BEYOND else "x"
        layer, _, stage = row.stage.rpartition(".")
        gradient = row.stage.startswith("grad.")
        if mark == "x" and not gradient and stage not in ("loss", "logits"):
            apart = TOGETHER if stage in TOGETHER else ()
            if side_by_side and not stage.startswith(("mlp", "out")):
                apart = (*apart, "mlp_in", "mlp_up", "mlp_act", "mlp_out")
            made_of_it = (
                r.mark
                for r in reversed(found)
                if not r.stage.startswith("grad.")
                and not (r.stage.startswith(layer) and r.stage.rpartition(".")[2] in apart)
            )
            mark = "~" if next(made_of_it, "x") != "x" else "x"
        found.append(row._replace(mark=mark))
    return found[::-1]


# ---- Names -------------------------------------------------------------------------------------------------


def named(kit: Kit, values: Values, rows: list[Row], dtype: str) -> list[Finding]:
    """The mistakes that bring the difference back to the noise: one, else two, else as many as their own
    stages tell apart; nothing if no combination explains what was given.

    Inner values that hooks have caught may stand under a wrong name, as where a port takes the product with
    our q for its k. So what the port itself calls by name decides, where all together give no answer.
    """
    half = dtype in ("bfloat16", "float16")
    known = [m for m in mistakes.of(kit.family) if half or not m.half and not m.rounds]
    sure = [row for row in rows if not row.seen]
    every = Search(kit, values, rows, dtype)
    if len(sure) in (0, len(rows)):
        named_only = every
    else:
        names = {(row.case, row.stage) for row in sure}
        kept = {
            case: {name: value for name, value in found.items() if (case, name) in names}
            for case, found in values.items()
        }
        named_only = Search(kit, {case: found for case, found in kept.items() if found}, sure, dtype)
    ones = [(m,) for m in known]
    for search in [every] if named_only is every else [every, named_only]:
        if found := search.explaining(ones):
            return [finding(kit, rows, search, found)]
    if found := every.explaining(every.step_by_step(known)):
        return [finding(kit, rows, every, found)]
    pairs = list(named_only.pairs(known))
    if found := named_only.explaining(pairs):
        return [finding(kit, rows, named_only, found)]
    return in_part(kit, named_only, rows, known, ones + pairs)


def finding(kit: Kit, rows: list[Row], search: "Search", found: list) -> Finding:
    """The best of what explains, and how much it explains."""
    (units, best), *others = found
    told = [row for row in rows if row.stage in search.values.get(row.case, {})]
    count = sum(int((~kit.expected[row.case][row.stage].isnan()).sum()) for row in told)
    before = max(row.units for row in told)
    return Finding(best, units, before, count, [other for _, other in others if len(other) == len(best)])


def in_part(
    kit: Kit, search: "Search", rows: list[Row], known: list[Mistake], candidates: list
) -> list[Finding]:
    """Which of `candidates` explains the plain case, and with one more mistake more of the others."""
    if "plain" not in search.cases or len(search.cases) < 2 or not search.wrong["plain"]:
        return []
    if not (found := search.only(["plain"]).explaining(candidates)):
        return []

    def explained(given: tuple[Mistake, ...]) -> list[str]:
        return [case for case in search.cases if search.only([case]).precisely(given) <= BEYOND]

    given = found[0][1]
    cases = explained(given)
    rest = [search.only([case]) for case in search.cases if case not in cases]
    wider_ones = [(*given, m) for m in known if m not in given]
    for wider in [w for w in wider_ones if any(one.explaining([w]) for one in rest)]:
        if set(cases) < set(reached := explained(wider)):
            given, cases = wider, reached
    part = search.only(cases)
    answer = finding(kit, rows, part, part.explaining([given]))
    answer.cases = cases if len(cases) < len(search.cases) else []
    return [answer]


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
        self.cases = sorted(values, key=lambda case: (worst[case] == 0, small[case]))  # quickest first
        self.focus, self.wrong = "plain" if worst.get("plain") else self.cases[0], worst
        self.coarse = BEYOND * (20 if dtype in ("bfloat16", "float16") else 1000)  # worth a closer look

    def only(self, cases: list[str]) -> "Search":
        """The same for some of the cases."""
        return Search(self.kit, {case: self.values[case] for case in cases}, self.rows, self.dtype)

    def stages(
        self, case: str, given: tuple[Mistake, ...], gradients: bool = False, note: Callable | None = None
    ) -> dict[str, Tensor]:
        """In float64, or as the port computes, where a mistake shows in half precision only."""
        weights = self.lowered if any(m.half for m in given) else self.kit.wide
        return stages(
            self.kit.config, weights, self.kit.inputs[case], mistakes=given, gradients=gradients, note=note
        )

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
            except IndexError:  # a mistake that finds nothing to read
                return math.inf
        return worst

    def explaining(self, candidates: Iterable[tuple[Mistake, ...]]) -> list[tuple[float, tuple]]:
        """Those that leave noise only, the nearest first. Their noise is measured with the mistake in the
        formula; before that, whatever is far beyond the right formula's noise is left out."""
        found = []
        for given in candidates if any(self.wrong.values()) else ():
            if self.distance(given, self.coarse, self.cases) > self.coarse:
                continue
            units = self.precisely(given)
            if units <= min(BEYOND, max(self.wrong.values()) / 3):  # less is no explanation
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
                ours = truth(self.kit.config, self.kit.wide, inputs, gradients, mistakes=given)
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

    def step_by_step(self, known: list[Mistake]) -> Iterable[tuple[Mistake, ...]]:
        """Each stage out of what the port itself had before it: there a mistake shows in its own stage only.
        Take one that mends the first such stage and leaves the fewest wrong, again and again."""
        given: tuple[Mistake, ...] = ()
        wrong = self.alone(given)
        while wrong and len(given) < 4:
            case, first = min(wrong, key=lambda one: (self.cases.index(one[0]), place(one[1])))
            mending = [m for m in known if m not in given and not self.alone((*given, m), [case], first)]
            left = [self.alone((*given, m)) for m in mending]
            if not left or len(min(left, key=len)) >= len(wrong):
                return
            wrong = min(left, key=len)
            given = (*given, mending[left.index(wrong)])
        if not wrong:
            yield given

    def alone(
        self, given: tuple[Mistake, ...], cases: list[str] | None = None, last: str | None = None
    ) -> set[tuple[str, str]]:
        """(case, stage) that do not follow from what the port had before them; none behind stage `last`."""
        found = set()
        for case in cases or self.cases:
            theirs, exact = self.values[case], self.kit.expected[case]

            def hear(name: str, value: Tensor, case=case, theirs=theirs, exact=exact) -> Tensor:
                if name not in theirs:
                    return value
                if self.far(case, name, compared(name, value, self.kit.inputs[case])) > BEYOND:
                    found.add((case, name))
                if name == last or (found and last):
                    raise Enough
                keep = exact[name].isnan() | theirs[name].isnan()
                return torch.where(keep, value, theirs[name].to(value.dtype))

            try:
                self.stages(case, given, note=hear)
            except Enough:
                pass
            except IndexError:
                found.add((case, ""))
        return found

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


class Enough(Exception):
    """No need to compute the rest."""
