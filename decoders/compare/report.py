"""What a comparison found: rows, the mistakes that explain them, and all of it as text or JSON."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .formula import stage_order
from .heat import human, in_frame, page
from .mistakes import Mistake


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
        names = " and ".join(m.name for m in self.mistakes)
        what = "this mistake" if len(self.mistakes) == 1 else "these mistakes"
        where = f" in {', '.join(self.cases)} (more is wrong in the others)" if self.cases else ""
        lines = [f"Your port equals ours with {what}{where}, to {self.units:.1f}x noise: {names}."]
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
        return min(wrong, key=lambda row: stage_order(row.stage)) if wrong else None

    @property
    def equal(self) -> bool:
        return self.first is None and not self.unsteady

    @property
    def sentence(self) -> str:
        if self.first is None:
            message = (
                f"{self.theirs} computes what {self.kit} expects, to {self.worst:.1f}x {self.dtype} noise"
            )
            return message + (", but not twice the same." if self.unsteady else ".")
        row = self.first
        wrong = [r.case for r in self.rows if r.mark == "x" and r.stage == row.stage]
        every = len(wrong) == len({r.case for r in self.rows if r.stage == row.stage})
        where = f"case{'s' * (len(wrong) > 1)} {', '.join(wrong)}"
        where = "every case" if every and len(wrong) > 1 else where
        before = [
            r
            for r in self.rows
            if r.mark == "=" and r.case == row.case and stage_order(r.stage) < stage_order(row.stage)
        ]
        what = f"is {human(row.units)}x {self.dtype} noise off"
        what = "has NaN or infinity" if math.isinf(row.units) else what
        message = f"First difference: {row.stage} in {where} {what}"
        if before:
            return f"{message}; the last that agrees before it is {before[-1].stage}."
        return message + ("." if row.stage == "embeddings" else "; nothing before it was given.")

    @property
    def worst(self) -> float:
        return max((row.units for row in self.rows if row.mark == "="), default=0.0)

    def as_json(self) -> dict:
        return {
            "equal": self.equal, "kit": self.kit, "theirs": self.theirs, "dtype": self.dtype,
            "first": None if self.first is None else {"case": self.first.case, "stage": self.first.stage},
            "sentence": self.sentence, "unsteady": self.unsteady,
            "mistakes": [{"names": [m.name for m in f.mistakes], "fixes": [m.fix for m in f.mistakes],
                          "numbers": [fitted(m) for m in f.mistakes],
                          "units": f.units, "before": finite(f.before), "values": f.values, "cases": f.cases,
                          "alike": [[m.name for m in other] for other in f.alike]} for f in self.findings],
            "likeness": self.likeness, "roundings": self.roundings, "remarks": self.remarks,
            "rows": [{**row._asdict(), **{key: finite(getattr(row, key)) for key in
                                          ("largest", "typical", "units")}} for row in self.rows],
        }  # fmt: skip

    def __str__(self) -> str:
        return "\n" + self.text()  # below pytest's own line

    def _repr_html_(self) -> str:
        """The page, in a frame: what a notebook shows."""
        return in_frame(page(self), 120 + 26 * len({row.stage for row in self.rows}))

    def text(self, every_stage: bool = False) -> str:
        """The answer, and below it the table; `every_stage`: of every case."""
        parts = [self.sentence, *map(str, self.findings), *self.likeness, *self.roundings, *self.remarks]
        return "\n".join([*parts, "", *self.table(every_stage)])

    def table(self, every_stage: bool = False) -> Iterable[str]:
        """Every stage of the case with the first difference, or of all; one line of each other."""
        width = max([len(name) for row in self.rows for name in (row.case, row.stage)] + [5])
        for case in dict.fromkeys(row.case for row in self.rows):
            own = [row for row in self.rows if row.case == case]
            worst, wrong = max(own, key=lambda row: row.units), [row for row in own if row.mark == "x"]
            count = f"{len(own):4} stage{'s' * (len(own) > 1)}"
            line = f"{case:{width}} {count}, the worst {worst.stage} at {human(worst.units)}x"
            if every_stage or (self.first is not None and case == self.first.case):
                yield f"  {case:{width}} {'largest':>9} {'typical':>9} {'x noise':>8}"
                yield from self.stage_lines(own, width, every_stage)
            elif wrong:
                yield f"x {line}, from {min(wrong, key=lambda row: stage_order(row.stage)).stage} on"
            else:
                yield f"= {line}"

    def stage_lines(self, own: list[Row], width: int, every_stage: bool) -> Iterable[str]:
        """A line for each stage; gradients in one, where they are many."""
        grads = [row for row in own if row.stage.startswith("grad.")]
        for row in own if every_stage else [row for row in own if row not in grads]:
            numbers = f"{row.largest:9.1e} {row.typical:9.1e} {human(row.units):>8}"
            yield f"{row.mark} {row.stage:{width}} {numbers}" + (f"  {row.seen}" if row.seen else "")
        if grads and not every_stage:
            bad, worst = [row for row in grads if row.mark == "x"], max(grads, key=lambda row: row.units)
            yield (
                f"{'x' if bad else '='} {len(grads)} gradients, {len(bad)} beyond the noise, the worst "
                f"{worst.stage} at {human(worst.units)}x"
            )


def fitted(m: Mistake) -> dict[str, float] | None:
    """The number in a mistake, if it has one."""
    return None if m.number is None else {"value": m.number, "error": m.error}


def finite(x: float) -> float | str:
    """JSON has no infinity."""
    return x if math.isfinite(x) else str(x)
