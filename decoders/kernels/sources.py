"""Whether a model is made of our model files as they are: a plan knows those, and no text that was edited.

`DIGESTS` has the text of each file that `plan.py` was written for, as Python reads it: comments, docstrings
and line breaks do not count. `python -m decoders.kernels.sources` prints those of the files as they are now;
who changes a model file looks whether its plan still computes the same, and then writes the new one here.
"""

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from .families import class_of

DIGESTS = {
    "phi.py": "645736945c006126",
    "phi3.py": "f9341f4ce2e210aa",
    "persimmon.py": "4d2a63390f0402f0",
    "fuyu.py": "0573042d727fb70d",
    "gpt_neo.py": "4f23530ad0162747",
    "openai_gpt.py": "2834f77088556630",
}
HERE = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)
OF_ANY_MODULE = set(dir(nn.Module)) - {"forward", "__call__", "_call_impl"}  # which compute nothing: `train`


class Owned(NamedTuple):
    """A function or method of a model file."""

    place: Any  # the names of a module or a class
    name: str
    value: Any  # what is there now
    code: CodeType  # what the file has there


def skeleton(node: Any) -> Any:
    """A syntax tree without docstrings, places and empty fields, as nested lists of strings."""
    if isinstance(node, list):
        return [skeleton(n) for n in node if not is_text(n)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ast.iter_fields(node)
    return [type(node).__name__, *([name, skeleton(v)] for name, v in fields if v is not None and v != [])]


def is_text(node: Any) -> bool:
    """Whether a statement is a docstring, or another string alone."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@lru_cache(maxsize=16)
def digest(text: str) -> str:
    """Of a file's text."""
    return hashlib.sha256(repr(skeleton(ast.parse(text))).encode()).hexdigest()[:16]


@lru_cache(maxsize=16)
def codes(text: str) -> dict[str, CodeType]:
    """The code of the functions of a file by their names, that of methods by `class.name`."""
    found = {}
    for own in codes_within(compile(text, "", "exec", dont_inherit=True)):
        if own.co_flags & inspect.CO_OPTIMIZED:
            found[own.co_name] = own
        else:  # the body of a class
            found |= {f"{own.co_name}.{method.co_name}": method for method in codes_within(own)}
    return found


def codes_within(code: CodeType) -> Iterator[CodeType]:
    """Of functions and classes that have names."""
    constants = (c for c in code.co_consts if isinstance(c, CodeType))
    return (c for c in constants if not c.co_name.startswith("<"))


def text_of(module: ModuleType | None) -> str:
    """Of the file that a module was made of; "" where there is none to be read."""
    try:
        return Path(str(getattr(module, "__file__", None))).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def is_known(text: str) -> bool:
    """Whether it is one of the six files, under whatever name."""
    try:
        return bool(text) and digest(text) in DIGESTS.values()
    except SyntaxError:
        return False


def own_classes(model: nn.Module) -> set[type]:
    """Those of the modules of `model`, but PyTorch's and those of this folder."""
    classes = {class_of(m) for m in model.modules()}
    return {c for c in classes if not c.__module__.startswith(("torch.nn.modules.", f"{__package__}."))}


def functions_of(model: nn.Module) -> list[Owned]:
    """The functions and methods of the model files that `model` is made of."""
    found: list[Owned] = []
    for module in {c.__module__: sys.modules.get(c.__module__) for c in own_classes(model)}.values():
        text = text_of(module)
        for path, code in (codes(text) if is_known(text) else {}).items():
            owner, _, name = path.rpartition(".")
            place: Any = vars(module)
            if owner:
                place = vars(place[owner]) if isinstance(place.get(owner), type) else {}
            found.append(Owned(place, name, place.get(name), code))
    return found


def code_of(value: Any) -> Any:
    """The code of a function, also of a property, a class method, or within a decorator of PyTorch; else
    None. Of somebody else's decorator it is the decorator's."""
    for name in ("__func__", "fget", "func"):
        value = getattr(value, name, value)
    code = getattr(value, "__code__", None)
    if hasattr(value, "__wrapped__") and (code is None or code.co_filename.startswith(TORCH)):
        return code_of(value.__wrapped__)
    return code


def why_edited(model: nn.Module) -> str:
    """Why `model` is not made of our model files as they are, in a sentence; "" where it is."""
    for c in own_classes(model):
        module = sys.modules.get(c.__module__)
        if vars(module or object).get(c.__name__) is not c or not is_known(text_of(module)):
            return f"{c.__module__}.{c.__name__} is not of a model file as plans know it"
    for own in functions_of(model):
        if code_of(own.value) != own.code:
            return f"{own.name} of its model file was replaced"
    for m in model.modules():
        for name, value in vars(m).items():
            computes = hasattr(type(m), name) and name not in OF_ANY_MODULE
            if callable(value) and computes and not is_of_kernels(value):
                return f"{name} of a {type(m).__name__} was replaced"
    return ""


def is_of_kernels(value: Any) -> bool:
    """Whether a function is defined in this folder."""
    value = value.func if isinstance(value, partial) else value
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    return code is not None and code.co_filename.startswith(HERE)


if __name__ == "__main__":
    for name in DIGESTS:
        print(f'    "{name}": "{digest(Path(HERE).parent.joinpath(name).read_text())}",')
