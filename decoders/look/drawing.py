"""The block of a model as an SVG picture: boxes in the order of computation, from top to bottom.

Path("block.svg").write_text(drawing(model))
"""

from html import escape

import torch.nn as nn

from decoders.compare.formula import Formula

from .diagram import Box, plan

STYLE = """
.diagram { font: 12px system-ui, sans-serif; --line: #6b7280; --box: #f3f4f6; --ink: #111827; --soft: #4b5563;
  --norm: #fdf0d5; --matrix: #dbeafe; --rotate: #7fb2e5; --sum: #ffffff; }
@media (prefers-color-scheme: dark) { .diagram { --line: #9ca3af; --box: #1f2937; --ink: #f3f4f6;
  --soft: #b6bdc9; --norm: #4a3a17; --matrix: #1e3a5f; --rotate: #3f78b5; --sum: #111827; } }
.diagram rect, .diagram circle { stroke: var(--line); fill: var(--box); }
.diagram .norm rect { fill: var(--norm); } .diagram .matrix rect { fill: var(--matrix); }
.diagram .sum circle { fill: var(--sum); } .diagram rect.rotated { fill: var(--rotate); stroke: none; }
.diagram text { fill: var(--ink); text-anchor: middle; } .diagram text.size { fill: var(--soft); font-size: 10.5px; }
.diagram path { stroke: var(--line); fill: none; stroke-width: 1.4; }
.diagram path.residual { stroke-width: 3; }
"""  # noqa: E501
WIDTH, ROW, HEIGHT = 96, 52, 38  # of a column, of a row, of a box


def drawing(model: nn.Module, layer: int = 0, standalone: bool = True, title: str = "") -> str:
    """SVG. Without `standalone` the page's own style sheet is expected, and boxes can be reached by keys."""
    p, f = plan(model, layer), Formula(model.config, {})
    margin = 62 if f.family == "openai-gpt" else 40  # norms stand in the first column there
    picture = Picture({box.key: box for box in p.boxes}, margin)
    width, height = int((p.columns - 0.35) * WIDTH) + 60, p.rows * ROW + 12
    lines = [picture.arrow(before, after) for before, after in p.edges]
    last = p.boxes[-1].key
    x, y = picture.center(last)
    lines.append(arrow(f"M{x:.0f} {y + picture.half(last):.0f}v16", residual=True))
    lines += [drawn(box, *picture.center(box.key), standalone) for box in p.boxes]
    x = picture.x_of(STREAM)
    label = f"{title or f.family}: one of {len(f.layers)} layers"
    first = f'<text x="{x + 14:.0f}" y="12" style="text-anchor: start">{escape(label)}, {f.C} wide</text>'
    style = f"<style>{STYLE}</style>" if standalone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="diagram" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(label)}, as boxes">{style}'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" style="fill: var(--line); '
        f'stroke: none"/></marker></defs>{"".join(lines)}'
        f'<circle cx="{x:.0f}" cy="14" r="5"/>{first}</svg>'
    )


STREAM = 0.2  # the column of the residual stream


class Picture:
    """Where boxes and arrows are, in pixels."""

    def __init__(self, boxes: dict[str, Box], margin: int):
        self.boxes, self.margin = boxes, margin

    def x_of(self, column: float) -> float:
        return (column - 0.35) * WIDTH + self.margin

    def center(self, key: str) -> tuple[float, float]:
        if key == "in":
            return self.x_of(STREAM), 14
        box = self.boxes[key]
        return self.x_of(box.column), box.row * ROW + HEIGHT / 2

    def half(self, key: str) -> float:
        """Half of a box's height."""
        if key == "in":
            return 7
        return 11 if self.boxes[key].kind == "sum" else HEIGHT / 2

    def reach(self, key: str) -> float:
        """How far from its centre an arrow may touch a box."""
        return self.boxes[key].wide * WIDTH / 2 - 24

    def arrow(self, before: str, after: str) -> str:
        (x0, y0), (x1, y1) = self.center(before), self.center(after)
        start, stop, stream = y0 + self.half(before), y1 - self.half(after), self.x_of(STREAM)
        if x0 == x1 == stream:
            return arrow(f"M{x0:.0f} {start:.0f}V{stop:.0f}", residual=True)
        if after.startswith("add"):  # from the side
            return arrow(f"M{x0:.0f} {start:.0f}V{y1:.0f}H{x1 + 11:.0f}")
        if x0 == stream:
            return arrow(f"M{x0:.0f} {start:.0f}V{stop - 8:.0f}H{x1:.0f}V{stop:.0f}")
        left = min(max(x1, x0 - self.reach(before)), x0 + self.reach(before))
        right = min(max(left, x1 - self.reach(after)), x1 + self.reach(after))
        return arrow(f"M{left:.0f} {start:.0f}L{right:.0f} {stop:.0f}")


def arrow(path: str, residual: bool = False) -> str:
    kind = ' class="residual"' if residual else ""
    return f'<path{kind} d="{path}" marker-end="url(#arrow)"/>'


def drawn(box: Box, x: float, y: float, standalone: bool) -> str:
    label, size = escape(box.label), escape(box.size)
    keys = f' tabindex="0" role="button" data-box="{box.key}" aria-label="{f"{label} {size}".strip()}"'
    group = f'<g class="box {box.kind}"{"" if standalone else keys}>'
    if box.kind == "sum":
        circle = f'<circle cx="{x:.0f}" cy="{y:.0f}" r="11"/>'
        return f'{group}{circle}<text x="{x:.0f}" y="{y + 4:.0f}">+</text></g>'
    w = box.wide * WIDTH - 10
    left, top = x - w / 2, y - HEIGHT / 2
    part = ""
    if box.rotated:
        part = (
            f'<rect class="rotated" x="{left + 1:.1f}" y="{top + HEIGHT - 5:.1f}" '
            f'width="{(w - 2) * box.rotated:.1f}" height="4"/>'
        )
    return (
        f'{group}<rect x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" height="{HEIGHT}" rx="5"/>{part}'
        f'<text x="{x:.0f}" y="{y - 3:.0f}">{label}</text>'
        f'<text class="size" x="{x:.0f}" y="{y + 11:.0f}">{size}</text></g>'
    )
