"""A notebook as a page: its text, its code, and the outputs that are kept in it, as Markdown for MyST."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FENCE = "`" * 6  # longer than any inside
PICTURES = ("image/png", "image/jpeg")


def as_markdown(file: Path) -> str:
    """Cells in their order. ValueError for an output that no page of ours has had yet."""
    cells = json.loads(file.read_text("utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in parts_of(cell)) + "\n"


def parts_of(cell: dict[str, Any]) -> Iterator[str]:
    source = text_of(cell["source"])
    yield source if cell["cell_type"] == "markdown" else fenced(source, "python")
    for output in cell.get("outputs", ()):
        yield shown(output)


def shown(output: dict[str, Any]) -> str:
    """The richest form that an output has."""
    if output["output_type"] == "stream":
        return fenced(text_of(output["text"]), "text")
    forms = output.get("data", {})
    for kind in PICTURES:
        if kind in forms:
            data = text_of(forms[kind]).replace("\n", "")
            return f'<img src="data:{kind};base64,{data}" alt="what the cell draws">'
    if "text/html" in forms:
        return fenced(text_of(forms["text/html"]), "{raw} html")
    if "text/markdown" in forms:
        return text_of(forms["text/markdown"])
    if "text/plain" in forms:
        return fenced(text_of(forms["text/plain"]), "text")
    raise ValueError(f"a page cannot show an output of {output['output_type']}: {', '.join(forms)}")


def fenced(text: str, language: str) -> str:
    return f"{FENCE}{language}\n{text.rstrip()}\n{FENCE}"


def text_of(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)
