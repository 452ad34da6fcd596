"""The lines of a model file that compute each box of its block.

Found in the syntax tree by the names of modules and functions, so that lines may move and be rewritten.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn as nn

from decoders.compare.formula import Formula

from .diagram import modules_of, plan

Spans = list[tuple[int, int]]  # first and last line of statements, counted from 1 in their file


class Source(NamedTuple):
    """Of a model file: its name, numbered lines of a block's classes, and which of them belong to a box."""

    file: str
    lines: list[tuple[int, str]]
    boxes: dict[str, Spans]


def source(model: nn.Module, layer: int = 0) -> Source:
    """The code of a block. ValueError where a box has no line."""
    finder = Finder(model, layer)
    boxes = {box.key: finder.spans(box.key) for box in plan(model, layer).boxes}
    if lost := [key for key, spans in boxes.items() if not spans]:
        raise ValueError(f"{finder.module.__name__} has no line that computes {lost[0]}")
    file = finder.module.__name__.replace(".", "/") + ".py"
    numbered = [line for part in finder.shown() for line in numbered_lines(part)]
    return Source(file, numbered, boxes)


class Finder:
    """Knows which method of which module computes a box."""

    def __init__(self, model: nn.Module, layer: int):
        self.f, self.parts = Formula(model.config, {}), modules_of(model, layer)
        block = model.get_submodule(f"{self.f.parts['layers']}.{layer}")
        self.block = type(block)
        self.attention = type(model.get_submodule(self.f.module("o", layer).rpartition(".")[0]))
        self.mlp = type(model.get_submodule(self.f.module("up", layer).rpartition(".")[0]))
        self.module = inspect.getmodule(self.block)

    def shown(self) -> list[Any]:
        """Classes and functions of a block, in the order in which they are read."""
        norm, rotate = type(self.parts["norm_1"]), getattr(self.attention, "rotate", None)
        own = [norm] if inspect.getmodule(norm) is self.module else []
        own += [rotate] if rotate is not None else []
        return [*own, self.attention.attend, self.attention, self.mlp, self.block]

    def spans(self, key: str) -> Spans:
        attend, forward = self.attention.attend, self.attention.forward
        if key in ("norm_1", "norm_2"):
            return statements(self.block.forward, uses(self.name(key)))
        if key in ("q", "k", "v"):
            method = getattr(self.attention, "qkv", forward)
            return statements(method, uses(self.name("qkv" if "qkv" in self.parts else key)))
        if key in ("qkv", "o", "q_norm", "k_norm"):
            return statements(forward, uses(self.name(key)))
        if key in ("q_rotary", "k_rotary"):
            return statements(forward, uses("rotate")) + whole(self.attention.rotate)
        if key == "scores":
            return statements(attend, is_product)[:1] + statements(
                attend, uses("scaled_dot_product_attention")
            )
        if key == "weights":
            return statements(attend, uses("softmax"))
        if key == "heads":
            return statements(attend, is_product)[-1:]
        if key in ("up", "down", "act"):
            return statements(self.mlp.forward, uses("act" if key == "act" else self.name(key)))
        sums = statements(self.block.forward, is_sum)
        return sums[:1] if key == "add_1" else sums[-1:]

    def name(self, part: str) -> str:
        return self.f.parts[part].rpartition(".")[2]


def uses(name: str) -> Callable[[ast.AST], bool]:
    """Whether a node is an attribute of this name: `self.q_proj`, `scores.softmax`."""
    return lambda node: isinstance(node, ast.Attribute) and node.attr == name


def is_product(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)


def is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def statements(where: Any, wanted: Callable[[ast.AST], bool]) -> Spans:
    """Each simple statement of a function that has a node that is wanted."""
    lines, first = inspect.getsourcelines(where)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    simple = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    chosen = [node for node in simple if any(map(wanted, ast.walk(node)))]
    return sorted((first + node.lineno - 1, first + node.end_lineno - 1) for node in chosen)


def whole(where: Any) -> Spans:
    lines, first = inspect.getsourcelines(where)
    return [(first, first + len(lines) - 1)]


def numbered_lines(where: Any) -> list[tuple[int, str]]:
    lines, first = inspect.getsourcelines(where)
    return [(first + i, line.rstrip("\n")) for i, line in enumerate(lines)]
