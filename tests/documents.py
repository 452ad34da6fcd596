"""The documentation of the six models: its examples, and the names that it gives, cut out of the text files.

`DECODERS_DOCS` is the folder of these files; nothing of them is kept here.
"""

import ast
import os
import re
from dataclasses import dataclass
from pathlib import Path

GLUED = re.compile(r"(model\.config)(Phi3Model)$")  # a heading without a line break before it
PLACEHOLDER = "/output/path"  # what the reader is to replace


def folder() -> Path | None:
    given = os.environ.get("DECODERS_DOCS")
    return Path(given) if given else None


@dataclass
class Example:
    file: str
    line: int
    code: str

    @property
    def kind(self) -> str:
        found = re.search(r"import.*\b(TF|Flax)\w+", self.code)
        return {"TF": "TensorFlow", "Flax": "Flax"}[found[1]] if found else "PyTorch"

    @property
    def title(self) -> str:
        """The classes that it imports."""
        names = re.findall(r"^from transformers[\w.]* import (.*)$", self.code, re.M)
        return ", ".join(name.strip() for line in names for name in line.split(","))

    def __str__(self) -> str:
        return f"{self.file[:3]}:{self.line}"


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def examples(where: Path) -> list[Example]:
    """In the order of the files; code with prompts, in a fence or not, and code without that imports."""
    found = []
    for file in sorted(where.glob("*.txt")):
        lines = file.read_text("utf-8").split("\n")
        i = 0
        while i < len(lines):
            if lines[i].startswith(">>>"):
                start, code, fenced = i, [], i > 0 and lines[i - 1].startswith("```")
                while i < len(lines) and (is_code(lines[i]) or (fenced and not lines[i].startswith("```"))):
                    if is_code(lines[i]):
                        code.append(GLUED.sub(r"\1", lines[i][4:].removesuffix("  # doctest: +SKIP")))
                    i += 1
                found.append(Example(file.name, start + 1, "\n".join(code)))
            elif lines[i].startswith("from ") and lines[i].isascii():
                start, end = i, i
                for j in range(i, min(i + 30, len(lines))):
                    block = "\n".join(lines[i : j + 1])
                    if not block.isascii() or lines[j].startswith(("```", "#")):
                        break
                    if parses(block):
                        end = j
                found.append(Example(file.name, start + 1, "\n".join(lines[start : end + 1]).strip()))
                i = end + 1
            else:
                i += 1
    return [one for one in found if "import" in one.code]


def is_code(line: str) -> bool:
    return line.startswith((">>>", "... ")) or line == "..."


if __name__ == "__main__":
    for one in examples(folder()):
        print("=====", one, one.kind, "|", one.title)
        print(one.code)
