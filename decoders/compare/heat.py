"""A report as one page: a row for each stage, a column for each case, red where a port parts from the kit."""

import html
import math
from typing import Any

from .formula import stage_order

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
h1 { font-size: 1.3em; } pre { background: #f5f5f2; padding: .8em 1em; white-space: pre-wrap; }
table { border-collapse: collapse; font-size: 12.5px; }
th { text-align: left; font-weight: 600; padding: 2px 8px; }
td { padding: 1px 8px; border: 1px solid #fff; text-align: right; font-variant-numeric: tabular-nums; }
td.stage { text-align: left; font-family: ui-monospace, monospace; background: #fafaf8; }
tr.layer td { border-top: 3px solid #fff; } td.none { background: #f0f0ee; }
td.first { outline: 2px solid #000; outline-offset: -2px; }
.legend td { min-width: 4.5em; text-align: center; }
"""


def colour(units: float) -> str:
    """Green within the noise, yellow at the limit, red from a thousand times on."""
    heat = 1.0 if not math.isfinite(units) else min(1.0, max(0.0, math.log10(max(units, 0.1)) / 4 + 0.1))
    hue = 130 * (1 - heat) ** 1.3
    return f"hsl({hue:.0f} 75% {78 - 22 * heat:.0f}%)"


def page(report: Any) -> str:
    """HTML of a `compare.Report`; it needs nothing else, no network, no script."""

    def text(value: object) -> str:
        return html.escape(str(value))

    cases = list(dict.fromkeys(row.case for row in report.rows))
    cells = {(row.stage, row.case): row for row in report.rows}
    every = sorted({row.stage for row in report.rows}, key=stage_order)
    first = report.first
    lines = ["<tr><th>stage</th>" + "".join(f"<th>{text(case)}</th>" for case in cases) + "</tr>"]
    before = ""
    for stage in every:
        layer = stage.split(".")[1] if stage.startswith("layers.") else stage.split(".")[0][:4]
        kind = ' class="layer"' if layer != before else ""
        before, parts = layer, [f'<td class="stage">{text(stage)}</td>']
        for case in cases:
            row = cells.get((stage, case))
            if row is None:
                parts.append('<td class="none"></td>')
                continue
            mark = ' class="first"' if first is not None and row is first else ""
            title = f"largest {row.largest:.2e}, typical {row.typical:.2e}"
            title += f", {row.seen}" if row.seen else ""
            otherwise = "~" if row.mark == "~" else ""
            parts.append(
                f'<td{mark} style="background: {colour(row.units)}" title="{text(title)}">'
                f"{otherwise}{human(row.units)}</td>"
            )
        lines.append(f"<tr{kind}>{''.join(parts)}</tr>")
    message = [*map(str, report.findings), *report.likeness, *report.roundings, *report.remarks]
    steps = (0.5, 1, 4, 10, 100, 1e3, 1e6)
    legend = "".join(f'<td style="background: {colour(u)}">{human(u)}x</td>' for u in steps)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{text(report.theirs)} against {text(report.kit)}</title>
<style>{STYLE}</style></head><body>
<h1>{text(report.sentence)}</h1>
{"<pre>" + text(chr(10).join(message)) + "</pre>" if message else ""}
<p>Each number is a difference in units of {text(report.dtype)} noise: what correct arithmetic of that
precision may be off. Above 4 it is a difference; the black frame is the first. A ~ is beyond the noise, but
what is computed of it agrees: the port names or orders that value otherwise.</p>
<table class="legend"><tr>{legend}</tr></table>
<p></p>
<table>
{chr(10).join(lines)}
</table></body></html>
"""


def in_frame(page: str, height: int) -> str:
    """A page inside another one, as a notebook shows it: its style stays its own."""
    style = f"width: 100%; height: {min(height, 760)}px; border: 1px solid #8884; border-radius: 4px"
    return f'<iframe sandbox="" style="{style}" srcdoc="{html.escape(page)}"></iframe>'


def human(x: float) -> str:
    """Example: 1.23, 12.3, 123, 1.2e+04"""
    if math.isinf(x):
        return "NaN"
    return f"{x:.3g}" if x < 1000 else f"{x:.1e}"
