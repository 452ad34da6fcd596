"""Keeps docs/reading/ true: the lines behind each name, the code that is quoted, what experiments print.

python -m tests.reading --write     # line numbers, diffs, and the output of every experiment that is quoted
"""

import contextlib
import difflib
import importlib
import inspect
import io
import re
import sys
from functools import reduce
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "reading").glob("*.md"))
NAMED = re.compile(r"\[`([\w.]+)`\]\(\.\./\.\./(decoders/[\w/]+)\.py(?:#[^)]*)?\)")
PRINTED = re.compile(r"```\n\$ python -m examples\.(experiments|solutions) ([\w-]+)\n(.*?)```\n", re.S)
DIFF = re.compile(r"<!-- diff ([\w.]+) ([\w.]+) -->\n```diff\n(.*?)```\n", re.S)
FAMILY = re.compile(r"\b(OpenAIGPT|GPTNeo|Phi3|Phi|Persimmon|Fuyu)(?=[A-Z])")


def source(name: str, module: str) -> tuple[list[str], int]:
    """Lines of what is called so in the file, and the number of the first."""
    found = reduce(getattr, name.split("."), importlib.import_module(module.replace("/", ".")))
    return inspect.getsourcelines(found)


def with_lines(text: str) -> str:
    """Each name linked with the lines that it has now."""

    def link(match: re.Match) -> str:
        name, module = match.groups()
        if name.endswith("_py") or name.startswith("decoders"):
            return match[0]
        lines, first = source(name, module)
        return f"[`{name}`](../../{module}.py#L{first}-L{first + len(lines) - 1})"

    return NAMED.sub(link, text)


def printed(module: str, name: str) -> str:
    """What an experiment or a solution prints below its question."""
    from examples.experiments import EXPERIMENTS
    from examples.solutions import SOLUTIONS

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        {"experiments": EXPERIMENTS, "solutions": SOLUTIONS}[module][name]()
    return output.getvalue()


def with_output(text: str) -> str:
    def block(match: re.Match) -> str:
        module, name, _ = match.groups()
        return f"```\n$ python -m examples.{module} {name}\n{printed(module, name)}```\n"

    return PRINTED.sub(block, text)


def without_family(name: str) -> list[str]:
    """The lines of `module.Name`, with PhiBlock as Block: else each diff would begin with what is known."""
    module, _, what = name.partition(".")
    return [FAMILY.sub("", line.rstrip()) for line in source(what, f"decoders/{module}")[0]]


def diff(old: str, new: str) -> str:
    """What `diff -u` shows of two definitions, whole."""
    lines = list(difflib.unified_diff(without_family(old), without_family(new), n=1000, lineterm=""))[3:]
    return "\n".join(line.rstrip() for line in lines or ["(no difference)"]).rstrip() + "\n"


def with_diffs(text: str) -> str:
    return DIFF.sub(lambda m: f"<!-- diff {m[1]} {m[2]} -->\n```diff\n{diff(m[1], m[2])}```\n", text)


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    for page in PAGES:
        page.write_text(with_output(with_diffs(with_lines(page.read_text()))))
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
