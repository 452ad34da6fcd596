"""One block of a model as a picture: drawn from the model's own modules and sizes, each box with the lines of
the model file that compute it.

    Path("block.svg").write_text(drawing(model))

Boxes stand in the order of computation from top to bottom: the norms where this model has them, attention and
MLP one after the other or (Phi) side by side, the part of a head that is rotated filled in.
"""

import ast
import inspect
import math
import textwrap
from html import escape
from typing import Any, NamedTuple

import torch.nn as nn

from decoders.compare.formula import Formula

from .traces import matrix_of

STYLE = """
.diagram { font: 12px system-ui, sans-serif; --line: #6b7280; --box: #f3f4f6; --ink: #111827; --soft: #4b5563;
  --norm: #fdf0d5; --matrix: #dbeafe; --turn: #7fb2e5; --sum: #ffffff; }
@media (prefers-color-scheme: dark) { .diagram { --line: #9ca3af; --box: #1f2937; --ink: #f3f4f6;
  --soft: #b6bdc9; --norm: #4a3a17; --matrix: #1e3a5f; --turn: #3f78b5; --sum: #111827; } }
.diagram rect, .diagram circle { stroke: var(--line); fill: var(--box); }
.diagram .norm rect { fill: var(--norm); } .diagram .matrix rect { fill: var(--matrix); }
.diagram .sum circle { fill: var(--sum); } .diagram rect.turned { fill: var(--turn); stroke: none; }
.diagram text { fill: var(--ink); text-anchor: middle; } .diagram text.size { fill: var(--soft); font-size: 10.5px; }
.diagram path { stroke: var(--line); fill: none; stroke-width: 1.4; }
.diagram path.residual { stroke-width: 3; }
"""  # noqa: E501
WIDTH, ROW, HEIGHT = 96, 52, 38  # of a column, of a row, of a box


class Box(NamedTuple):
    key: str  # what the page knows it by
    label: str
    size: str
    stage: str  # of a layer, whose value it hands on
    row: int
    column: float  # in columns, of its centre
    wide: float = 1.0
    kind: str = ""  # norm, matrix, sum
    turned: float = 0.0  # which part of a head is rotated


class Plan(NamedTuple):
    boxes: list[Box]
    edges: list[tuple[str, str]]  # keys; "in" is what enters the block
    rows: int
    columns: float


# ---- What is where -----------------------------------------------------------------------------------------


def modules_of(model: nn.Module, layer: int = 0) -> dict[str, nn.Module]:
    """Part of `formula.PARTS` -> module, of one layer."""
    f = Formula(model.config, {})
    found = {
        part: f.module(part, layer)
        for part in f.parts
        if part not in ("table", "places", "layers", "norm", "head", "patches")
    }
    return {
        part: model.get_submodule(name)
        for part, name in found.items()
        if f.head_norms or part not in ("q_norm", "k_norm")
    }


def plan(model: nn.Module, layer: int = 0) -> Plan:
    """Boxes and arrows of a layer."""
    f, parts = Formula(model.config, {}), modules_of(model, layer)
    side_by_side, behind = f.family == "phi", f.family == "openai-gpt"
    boxes: list[Box] = []
    edges: list[tuple[str, str]] = []
    row = 1

    def add(key: str, label: str, size: str, stage: str, column: float, *after: str, **more: Any) -> str:
        boxes.append(Box(key, label, size, stage, row, column, **more))
        edges.extend((before, key) for before in after)
        return key

    def norm(key: str, stage: str, column: float, after: str) -> str:
        module = parts[key]
        return add(key, type(module).__name__, f"{f.C} numbers", stage, column, after, kind="norm")

    def matrix(part: str, label: str, stage: str, column: float, after: str, wide: float = 1.0) -> str:
        n, m = matrix_of(parts[part]).shape
        return add(part, label, f"{m:,} → {n:,}", stage, column, after, wide=wide, kind="matrix")

    def name(part: str) -> str:
        return f.parts[part].rpartition(".")[2]

    start = "in"
    if not behind:
        start = norm("norm_1", "attn_in", 2.0, "in")
        row += 1
    if "joint" in parts:
        joint = matrix("joint", name("joint"), "q", 2.0, start, 3.0)
        row += 1
        last = {
            part: add(part, part, f"{f.H if part == 'q' else f.K} heads of {f.D}", part, 1.0 + i, joint)
            for i, part in enumerate("qkv")
        }
    else:
        last = {part: matrix(part, name(part), part, 1.0 + i, start) for i, part in enumerate("qkv")}
    row += 1
    for part in "qk" if f.head_norms else "":
        last[part] = add(
            f"{part}_norm",
            "LayerNorm",
            f"each head: {f.D}",
            f"{part}_normed",
            1.0 + "qk".index(part),
            last[part],
            kind="norm",
        )
    row += f.head_norms
    for part in "qk" if f.R else "":
        size = f"{f.R} of {f.D} turned" if f.R < f.D else f"all {f.D} turned"
        last[part] = add(
            f"{part}_turn",
            "rotary",
            size,
            f"{part}_rotated",
            1.0 + "qk".index(part),
            last[part],
            turned=f.R / f.D,
        )
    row += bool(f.R)
    scale = "" if f.scale == 1 else f" / √{f.D}" if math.isclose(f.scale, f.D**-0.5) else f" × {f.scale:.3g}"
    window = f.windows[layer]
    seen = f"the last {window} keys" if window else "all keys before"
    scores = add("scores", f"q kᵀ{scale}", seen, "scores", 1.5, last["q"], last["k"], wide=2.0)
    row += 1
    weights = add("weights", "softmax", "sum to 1", "weights", 1.5, scores, wide=2.0)
    row += 1
    heads = add(
        "heads", "weights × v", f"{f.H} heads side by side", "heads", 2.0, weights, last["v"], wide=3.0
    )
    row += 1
    o = matrix("o", name("o"), "attn_out", 2.0, heads, 3.0)
    row += 1
    after_attention, center, top = row, 2.0, 0
    if side_by_side:
        center, top = 4.4, 2
        row = top
        feed = start
    else:
        feed = add("add_1", "+", "", "attn_sum", 0.2, "in", o, kind="sum")
        row += 1
        feed = norm("norm_1" if behind else "norm_2", "mlp_in", 0.2 if behind else 2.0, feed)
        row += 1
    gate = "gate | up: " if f.gated else ""
    up = matrix("up", f"{gate}{name('up')}", "mlp_up", center, feed, 1.6 if side_by_side else 3.0)
    row += 1
    act = add(
        "act",
        activation_of(f),
        "gate × up" if f.gated else "each number",
        "mlp_act",
        center,
        up,
        wide=1.6 if side_by_side else 3.0,
    )
    row += 1
    down = matrix("down", name("down"), "mlp_out", center, act, 1.6 if side_by_side else 3.0)
    row = max(row + 1, after_attention)
    out = add(
        "add_2",
        "+",
        "",
        "out",
        0.2,
        "in" if side_by_side else feed if behind else "add_1",
        down,
        *([o] if side_by_side else []),
        kind="sum",
    )
    if behind:
        row += 1
        norm("norm_2", "out", 0.2, out)
    return Plan(boxes, edges, row + 1, 5.4 if side_by_side else 3.8)


def activation_of(f: Formula) -> str:
    get = vars(f.config).get
    name = get("hidden_act") or get("activation_function") or get("afn")
    return {
        "gelu_new": "GELU (tanh)",
        "gelu": "GELU (tanh)" if f.family == "openai-gpt" else "GELU",
        "silu": "SiLU",
        "swish": "SiLU",
        "relu2": "ReLU²",
        "relu": "ReLU",
    }.get(name, name)


# ---- Drawing -----------------------------------------------------------------------------------------------


def drawing(model: nn.Module, layer: int = 0, standalone: bool = True, title: str = "") -> str:
    """SVG. Without `standalone` the page's own style sheet is expected, and boxes can be reached by keys."""
    p, f = plan(model, layer), Formula(model.config, {})
    at = {box.key: box for box in p.boxes}
    width, height = int((p.columns - 0.35) * WIDTH) + 60, p.rows * ROW + 12

    margin = 62 if f.family == "openai-gpt" else 40  # norms stand in the first column there

    def x_of(column: float) -> float:
        return (column - 0.35) * WIDTH + margin

    def center(key: str) -> tuple[float, float]:
        return (x_of(0.2), 14) if key == "in" else (x_of(at[key].column), at[key].row * ROW + HEIGHT / 2)

    def half(key: str) -> float:
        return 7 if key == "in" else 11 if at[key].kind == "sum" else HEIGHT / 2

    lines = []
    for before, after in p.edges:
        (x0, y0), (x1, y1) = center(before), center(after)
        main = x0 == x1 == x_of(0.2)
        if main:
            path = f"M{x0:.0f} {y0 + half(before):.0f}V{y1 - half(after):.0f}"
        elif after.startswith("add"):  # from the side
            path = f"M{x0:.0f} {y0 + half(before):.0f}V{y1:.0f}H{x1 + 11:.0f}"
        elif x0 == x_of(0.2):
            middle = y1 - half(after) - 8
            path = f"M{x0:.0f} {y0 + half(before):.0f}V{middle:.0f}H{x1:.0f}V{y1 - half(after):.0f}"
        else:
            start = min(max(x1, x0 - spread(at[before])), x0 + spread(at[before]))
            stop = min(max(start, x1 - spread(at[after])), x1 + spread(at[after]))
            path = f"M{start:.0f} {y0 + half(before):.0f}L{stop:.0f} {y1 - half(after):.0f}"
        kind = ' class="residual"' if main else ""
        lines.append(f'<path{kind} d="{path}" marker-end="url(#arrow)"/>')
    last = p.boxes[-1].key
    x, y = center(last)
    lines.append(f'<path class="residual" d="M{x:.0f} {y + half(last):.0f}v16" marker-end="url(#arrow)"/>')
    lines += [drawn(box, *center(box.key), standalone) for box in p.boxes]
    x = x_of(0.2)
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


def spread(box: Box) -> float:
    """How far from its centre an arrow may touch it."""
    return box.wide * WIDTH / 2 - 24


def drawn(box: Box, x: float, y: float, standalone: bool) -> str:
    reach = (
        ""
        if standalone
        else (
            f' tabindex="0" role="button" data-box="{box.key}" aria-label="'
            f'{escape(f"{box.label} {box.size}".strip())}"'
        )
    )
    group = f'<g class="box {box.kind}"{reach}>'
    if box.kind == "sum":
        return (
            f'{group}<circle cx="{x:.0f}" cy="{y:.0f}" r="11"/><text x="{x:.0f}" y="{y + 4:.0f}">+</text></g>'
        )
    w = box.wide * WIDTH - 10
    left, top = x - w / 2, y - HEIGHT / 2
    part = (
        (
            f'<rect class="turned" x="{left + 1:.1f}" y="{top + HEIGHT - 5:.1f}" '
            f'width="{(w - 2) * box.turned:.1f}" height="4"/>'
        )
        if box.turned
        else ""
    )
    return (
        f'{group}<rect x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" height="{HEIGHT}" rx="5"/>{part}'
        f'<text x="{x:.0f}" y="{y - 3:.0f}">{escape(box.label)}</text>'
        f'<text class="size" x="{x:.0f}" y="{y + 11:.0f}">{escape(box.size)}</text></g>'
    )


# ---- The lines that compute it -----------------------------------------------------------------------------


class Source(NamedTuple):
    """Of a model file: its name, numbered lines of a block's classes, and which of them belong to a box."""

    file: str
    lines: list[tuple[int, str]]
    boxes: dict[str, list[tuple[int, int]]]


def source(model: nn.Module, layer: int = 0) -> Source:
    """Found by what the lines say, so that a file may change; ValueError where a box has none."""
    f, parts = Formula(model.config, {}), modules_of(model, layer)
    block = model.get_submodule(f"{f.parts['layers']}.{layer}")
    attention = model.get_submodule(f.module("o", layer).rpartition(".")[0])
    mlp = model.get_submodule(f.module("up", layer).rpartition(".")[0])
    module = inspect.getmodule(type(block))
    formula = module.attention
    shown = [
        one
        for one in (
            getattr(module, "RMSNorm", None),
            getattr(module, "rotate", None),
            formula,
            type(attention),
            type(mlp),
            type(block),
        )
        if one is not None
    ]
    numbered = [
        (first + i, line.rstrip("\n"))
        for one in shown
        for lines, first in [inspect.getsourcelines(one)]
        for i, line in enumerate(lines)
    ]
    found: dict[str, list[tuple[int, int]]] = {}

    def at(key: str, where: Any, *needles: str) -> None:
        found[key] = [span for needle in needles for span in statements(where, needle)]
        if not found[key]:
            raise ValueError(f"{module.__name__} has no line with {needles[0]!r}, as diagram.source expects")

    def own(part: str) -> str:
        return f"self.{f.parts[part].rpartition('.')[2]}"

    step = type(attention).forward
    for box in plan(model, layer).boxes:
        key = box.key
        if key in ("norm_1", "norm_2"):
            at(key, type(block).forward, f"{own(key)}(")
        elif key in ("q", "k", "v"):
            at(key, getattr(type(attention), "qkv", step), own("joint") if "joint" in parts else own(key))
        elif key in ("joint", "o", "q_norm", "k_norm"):
            at(key, step, own(key))
        elif key in ("q_turn", "k_turn"):
            at(key, step, "self.rotate(")
            found[key] += whole(module.rotate)
        elif key == "scores":
            at(key, formula, "scores =", "scaled_dot_product")
        elif key == "weights":
            at(key, formula, ".softmax(")
        elif key == "heads":
            at(key, formula, "weights @")
        elif key in ("up", "down"):
            at(key, type(mlp).forward, f"{own(key)}(")
        elif key == "act":
            at(key, type(mlp).forward, "self.act(")
        else:
            sums = statements(type(block).forward, " + ")
            found[key] = [sums[0] if key == "add_1" else sums[-1]]
    return Source(module.__name__.replace(".", "/") + ".py", numbered, found)


def statements(where: Any, needle: str) -> list[tuple[int, int]]:
    """First and last line, in its file, of each statement of a function that holds `needle`."""
    lines, first = inspect.getsourcelines(where)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    simple = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    spans = [
        (node.lineno, node.end_lineno)
        for node in simple
        if needle in "".join(lines[node.lineno - 1 : node.end_lineno])
    ]
    return sorted((first + a - 1, first + b - 1) for a, b in spans)


def whole(where: Any) -> list[tuple[int, int]]:
    lines, first = inspect.getsourcelines(where)
    return [(first, first + len(lines) - 1)]
