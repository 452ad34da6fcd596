"""Keeps docs/reading/ true: the lines behind each name, the code that is quoted, what experiments print.

python -m tests.reading --write     # line numbers, and the output of every experiment that is quoted
"""

import contextlib
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
PRINTED = re.compile(r"```\n\$ python -m examples\.experiments ([\w-]+)\n(.*?)```\n", re.S)


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


def printed(name: str) -> str:
    """What an experiment prints below its question."""
    from examples.experiments import EXPERIMENTS

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        EXPERIMENTS[name]()
    return output.getvalue()


def with_output(text: str) -> str:
    return PRINTED.sub(lambda m: f"```\n$ python -m examples.experiments {m[1]}\n{printed(m[1])}```\n", text)


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    for page in PAGES:
        page.write_text(with_output(with_lines(page.read_text())))
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
