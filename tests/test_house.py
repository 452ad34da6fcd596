"""Who may import whom: all imports of the package, those inside functions too, against the rules of the house."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "decoders"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
MODELS = {"gpt_neo", "openai_gpt", "phi", "phi3", "persimmon", "fuyu"}
EVERYTHING = {*MODELS, *ROOMS, "heads", "weights", "tokenize", "root"}

# Room or file of the package -> what it may import beside itself; "root" is decoders/__init__.py.
MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(MODELS, set()),
    "root": {"formats", "heads"},
    "formats": set(),
    "kernels": set(),
    "heads": MODELS,
    "weights": {"formats", "kernels"},
    "tokenize": {"formats"},
    "decoding": {"kernels"},
    "compare": {"formats", "weights", "root"},
    "look": {"compare", "kernels", "formats"},
    "hf": {*MODELS, "heads", "weights", "tokenize", "decoding", "formats", "root"},
    "parallel": {"weights", "formats", "kernels"},
    "cli": EVERYTHING,
    "__main__": {"cli"},
}
# Modules that are entered beside the door: the formula of the six, which is as large as a room.
BESIDE_THE_DOOR = {("look", "decoders.compare.formula")}


class Import(NamedTuple):
    file: Path
    line: int
    target: str  # a module of the package
    names: tuple[str, ...]  # what is taken from it; () for the module itself
    is_relative: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def room_of(module: str) -> str:
    """The room, or the file at the top of the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "root"


def imports_of(file: Path) -> Iterator[Import]:
    """What `file` takes from the package, anywhere in it."""
    package = module_of(file).split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "decoders":
                    yield Import(file, node.lineno, alias.name, (), False)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            if base.split(".")[0] == "decoders":
                yield from taken(file, node, base)
        elif (name := dynamic(node)) is not None:
            yield Import(file, node.lineno, ".".join([*package, name]), (), True)


def dynamic(node: ast.AST) -> str | None:
    """The name in `import_module(".name", ...)`."""
    if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "import_module":
        return None
    argument = node.args[0]
    value = argument.value if isinstance(argument, ast.Constant) else ""
    return value[1:] if str(value).startswith(".") else None


def offered(package: str) -> set[str]:
    """What the door of a room names in its `__all__`."""
    file = MODULES[package]
    if file.name != "__init__.py":
        return set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign | ast.AugAssign) and "__all__" in ast.dump(node):
            return {text.value for text in ast.walk(node.value) if isinstance(text, ast.Constant)}
    return set()


def taken(file: Path, node: ast.ImportFrom, base: str) -> Iterator[Import]:
    """Of `from base import a, b` the modules among them, and `base` where there are other names."""
    names = [alias.name for alias in node.names]
    is_outside = room_of(module_of(file)) != room_of(base)
    through_the_door = offered(base) if is_outside and base != "decoders" else set()
    modules = [name for name in names if f"{base}.{name}" in MODULES and name not in through_the_door]
    for name in modules:
        yield Import(file, node.lineno, f"{base}.{name}", (), bool(node.level))
    if others := tuple(name for name in names if name not in modules):
        yield Import(file, node.lineno, base, others, bool(node.level))


ALL = [one for file in FILES for one in imports_of(file)]


def is_inside(one: Import) -> bool:
    """Both in the same room."""
    room = room_of(module_of(one.file))
    return room in ROOMS and room == room_of(one.target)


def test_every_import_is_one_that_the_house_allows():
    wrong = [
        f"{one}: {room_of(module_of(one.file))} may not"
        for one in ALL
        if room_of(one.target)
        not in {room_of(module_of(one.file)), *MAY_IMPORT[room_of(module_of(one.file))]}
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_are_entered_through_their_doors():
    wrong = []
    for one in ALL:
        room = room_of(module_of(one.file))
        is_door = one.target.count(".") < 2
        if not is_inside(one) and not is_door and (room, one.target) not in BESIDE_THE_DOOR:
            wrong.append(f"{one}: not through the door")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_a_room_are_relative():
    wrong = [f"{one}: inside its room" for one in ALL if is_inside(one) and not one.is_relative]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_door_says_what_the_room_is_for(room):
    assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))


def test_there_are_no_circles():
    """Imports inside functions count: they hide a circle, they do not undo it."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for one in ALL:
        graph[module_of(one.file)].add(one.target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("code", ["import decoders", "import decoders.cli"], ids=str)
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    heavy = ("torch", "tiktoken", "safetensors", "sentencepiece", "numpy")
    code = f"{code}, sys; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "[]\n", found.stdout + found.stderr


def test_what_the_package_offers_is_there():
    import decoders

    for name in decoders.__all__:
        assert getattr(decoders, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = decoders.nothing
