"""Where does a port differ, by how much more than rounding, and what is the mistake?

    report = run("KIT", port)       # a file of values, a dict, a function, a module, "transformers"
    assert report.equal, report     # prints as a table

Every stage is measured in units of the noise that a kit brings along: what correct arithmetic of that
precision may be off. Where something differs, the mistakes of `mistakes/` are tried: one, several of which
each shows in a stage of its own, two at once. A name is given only if our formula, with these mistakes in it,
gives all that the port gave, within the noise.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from . import mistakes, ports
from .formula import stage_order
from .inner_values import PortValues
from .kit import Kit
from .likeness import likeness
from .naming import named
from .noise import BEYOND, DTYPES
from .report import Report, Row
from .rows import fitted, marked, measured
from .search import Search


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
    port = ports.values_of(kit, theirs, dtype, chosen)
    values = in_our_shapes(kit, port)
    if not any(values.values()):
        raise ValueError(
            f"{port.name} holds no stage of this kit: name them {chosen[0]}/logits, "
            f"{chosen[0]}/layers.0.out ..., as KIT.md says"
        )
    rows = [row for case, stages in values.items() for row in rows_of_case(kit, port, case, stages)]
    name = kit.folder.name or str(kit.folder)
    report = Report(name, port.name, port.dtype, rows, port.remarks, unsteady=port.unsteady)
    if names:
        explain(report, kit, values)
    return report


def in_our_shapes(kit: Kit, port: PortValues) -> dict[str, dict[str, Tensor]]:
    """Case -> stage -> the port's value, as far as the kit has it too, in the order of the computation."""
    return {
        case: {
            name: fitted(kit, case, name, port.values[case][name])
            for name in sorted(port.values[case], key=stage_order)
            if name in kit.expected[case]
        }
        for case in kit.inputs
        if case in port.values
    }


def rows_of_case(kit: Kit, port: PortValues, case: str, stages: dict[str, Tensor]) -> list[Row]:
    rows = [
        measured(kit, case, name, value, port.dtype, port.seen.get((case, name), ""))
        for name, value in stages.items()
    ]
    return marked(rows, parallel_block=kit.family == "phi")


def explain(report: Report, kit: Kit, values: dict[str, dict[str, Tensor]]) -> None:
    """Put the names of mistakes into a report, or else what the difference looks like."""
    if report.dtype in ("bfloat16", "float16"):
        report.roundings = Search(kit, values, report.rows, report.dtype).roundings()
    first = report.first
    if first is None:
        return
    report.findings = named(kit, values, report.rows, report.dtype)
    if report.findings:
        return
    report.likeness = [
        f"None of {len(mistakes.of(kit.family))} known mistakes, no two of them, and no other number in the "
        f"place of one of {len(mistakes.quantities_of(kit.family))} explain it. The more inner values a port "
        "gives (KIT.md), the more mistakes can be told apart."
    ]
    tolerance = kit.unit(first.case, first.stage, report.dtype)[0] * BEYOND
    exact, theirs = kit.expected[first.case][first.stage], values[first.case][first.stage]
    report.likeness += likeness(exact, theirs, tolerance, first.stage, kit.inputs[first.case])
