"""The block of a model as a plan of boxes and arrows, made from the model's own modules and sizes.

Boxes stand in the order of computation: pre-norm or post-norm as this model has it, attention and MLP one
after the other or parallel (Phi), the part of a head that is rotated filled in.
"""

import math
from typing import Any, NamedTuple

import torch.nn as nn

from decoders.compare.formula import Formula

from .attribution import matrix_of


class Box(NamedTuple):
    key: str  # what the page knows it by
    label: str
    size: str
    stage: str  # of a layer, whose value it hands on
    row: int
    column: float  # in columns, of its centre
    wide: float = 1.0
    kind: str = ""  # norm, matrix, sum
    rotated: float = 0.0  # which part of a head is rotated


class Plan(NamedTuple):
    boxes: list[Box]
    edges: list[tuple[str, str]]  # keys; "in" is what enters the block
    rows: int
    columns: float


def modules_of(model: nn.Module, layer: int = 0) -> dict[str, nn.Module]:
    """Part of `formula.PARTS` -> module, of one layer."""
    f = Formula(model.config, {})
    found = {
        part: f.module(part, layer)
        for part in f.parts
        if part not in ("embedding", "position_embedding", "layers", "norm", "head", "patches")
    }
    return {
        part: model.get_submodule(name)
        for part, name in found.items()
        if f.qk_layernorm or part not in ("q_norm", "k_norm")
    }


def plan(model: nn.Module, layer: int = 0) -> Plan:
    """Boxes and arrows of a layer."""
    return Planner(model, layer).plan()


class Planner:
    """Puts box after box: `row` is where the next one stands."""

    def __init__(self, model: nn.Module, layer: int):
        self.f, self.modules, self.layer = Formula(model.config, {}), modules_of(model, layer), layer
        self.parallel, self.post_norm = self.f.family == "phi", self.f.family == "openai-gpt"
        self.boxes: list[Box] = []
        self.edges: list[tuple[str, str]] = []
        self.row = 1

    def plan(self) -> Plan:
        start = "in"
        if not self.post_norm:
            start = self.norm("norm_1", "attn_in", 2.0, "in")
            self.row += 1
        attn_out = self.attention(self.project(start))
        below_attention, center = self.row, 2.0
        if self.parallel:
            center, self.row, feed, stream = 4.4, 2, start, "in"
        else:
            stream = self.add("add_1", "+", "", "attn_sum", 0.2, "in", attn_out, kind="sum")
            self.row += 1
            own = "norm_1" if self.post_norm else "norm_2"
            feed = self.norm(own, "mlp_in", 0.2 if self.post_norm else 2.0, stream)
            stream = feed if self.post_norm else stream
            self.row += 1
        mlp_out = self.mlp(feed, center)
        self.row = max(self.row + 1, below_attention)
        added = [mlp_out, attn_out] if self.parallel else [mlp_out]
        out = self.add("add_2", "+", "", "out", 0.2, stream, *added, kind="sum")
        if self.post_norm:
            self.row += 1
            self.norm("norm_2", "out", 0.2, out)
        return Plan(self.boxes, self.edges, self.row + 1, 5.4 if self.parallel else 3.8)

    def add(
        self, key: str, label: str, size: str, stage: str, column: float, *after: str, **more: Any
    ) -> str:
        self.boxes.append(Box(key, label, size, stage, self.row, column, **more))
        self.edges.extend((previous, key) for previous in after)
        return key

    def norm(self, key: str, stage: str, column: float, after: str) -> str:
        label = type(self.modules[key]).__name__
        return self.add(key, label, f"{self.f.C} numbers", stage, column, after, kind="norm")

    def matrix(self, part: str, label: str, stage: str, column: float, after: str, wide: float = 1.0) -> str:
        n, m = matrix_of(self.modules[part]).shape
        return self.add(part, label, f"{m:,} → {n:,}", stage, column, after, wide=wide, kind="matrix")

    def name(self, part: str) -> str:
        return self.f.parts[part].rpartition(".")[2]

    def project(self, start: str) -> dict[str, str]:
        """q, k and v, each with its norm and its rotation: part -> its last box."""
        f = self.f
        if "qkv" in self.modules:
            fused = self.matrix("qkv", self.name("qkv"), "q", 2.0, start, 3.0)
            self.row += 1
            counts = {"q": f.H, "k": f.K, "v": f.K}
            last = {
                part: self.add(part, part, f"{n} heads of {f.D}", part, 1.0 + i, fused)
                for i, (part, n) in enumerate(counts.items())
            }
        else:
            last = {
                part: self.matrix(part, self.name(part), part, 1.0 + i, start) for i, part in enumerate("qkv")
            }
        self.row += 1
        if f.qk_layernorm:
            self.each_of_q_and_k(last, "norm", "LayerNorm", f"each head: {f.D}", "normed", kind="norm")
        if f.R:
            size = f"{f.R} of {f.D} rotated" if f.R < f.D else f"all {f.D} rotated"
            self.each_of_q_and_k(last, "rotary", "rotary", size, "rotated", rotated=f.R / f.D)
        return last

    def each_of_q_and_k(
        self, last: dict[str, str], key: str, label: str, size: str, stage: str, **more: Any
    ) -> None:
        for column, part in ((1.0, "q"), (2.0, "k")):
            last[part] = self.add(f"{part}_{key}", label, size, f"{part}_{stage}", column, last[part], **more)
        self.row += 1

    def attention(self, last: dict[str, str]) -> str:
        """Scores, softmax, weights times v and the output matrix."""
        f, window = self.f, self.f.windows[self.layer]
        seen = f"the last {window} keys" if window else "all keys before"
        label = f"q kᵀ{scale_of(f)}"
        scores = self.add("scores", label, seen, "scores", 1.5, last["q"], last["k"], wide=2.0)
        self.row += 1
        weights = self.add("weights", "softmax", "sum to 1", "weights", 1.5, scores, wide=2.0)
        self.row += 1
        size = f"{f.H} heads side by side"
        heads = self.add("heads", "weights × v", size, "heads", 2.0, weights, last["v"], wide=3.0)
        self.row += 1
        out = self.matrix("o", self.name("o"), "attn_out", 2.0, heads, 3.0)
        self.row += 1
        return out

    def mlp(self, feed: str, center: float) -> str:
        f, wide = self.f, 1.6 if self.parallel else 3.0
        gate = "gate | up: " if f.gated else ""
        up = self.matrix("up", f"{gate}{self.name('up')}", "mlp_up", center, feed, wide)
        self.row += 1
        size = "gate × up" if f.gated else "each number"
        act = self.add("act", activation_of(f), size, "mlp_act", center, up, wide=wide)
        self.row += 1
        return self.matrix("down", self.name("down"), "mlp_out", center, act, wide)


def scale_of(f: Formula) -> str:
    if f.scale == 1:
        return ""
    return f" / √{f.D}" if math.isclose(f.scale, f.D**-0.5) else f" × {f.scale:.3g}"


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
