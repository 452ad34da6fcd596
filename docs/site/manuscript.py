"""A Sphinx extension: what GitHub shows of the repository is shown by the site too.

Links to files of the repository lead to pages of the site, with the line; README, CONTRIBUTING, CHANGELOG
and the notebooks are pages without being copied (`<!-- page: FILE -->`); docstrings, which are Markdown, are
read as such.
"""

import os
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from lessons import as_markdown
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LESSONS = ("README.md", *(f"{file.stem}.ipynb" for file in sorted((ROOT / "notebooks").glob("*.ipynb"))))
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "site/contributing.md",
    "CHANGELOG.md": "site/changelog.md",
    **{f"notebooks/{name}": f"site/notebooks/{name.split('.')[0]}.md" for name in LESSONS},
}
PAGE = re.compile(r"<!-- page: (\S+) -->")
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
IMAGE = re.compile(r'(<img src=")([^"]+)(")')
PICTURE = re.compile(r'<picture>\s*<source[^>]*srcset="([^"]+)">\s*<img src="([^"]+)"([^>]*)>\s*</picture>')
ANCHOR = re.compile(r'^<a id="([\w-]+)"></a>$', re.M)
MOST = 400_000  # bytes of a file that is shown


# ---- Pages -------------------------------------------------------------------------------------------------


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """The text of a page as MyST reads it."""
    file = DOCS / f"{name}.md"
    text = relinked(source[0], file, file)

    def included(match: re.Match) -> str:
        other = (file.parent / match[1]).resolve()
        app.env.note_dependency(str(other))
        text = as_markdown(other) if other.suffix == ".ipynb" else other.read_text("utf-8")
        return relinked(text, other, file)

    text = PAGE.sub(included, text)
    text = PICTURE.sub(r'<img src="\2" class="only-light"\3>\n<img src="\1" class="only-dark"\3>', text)
    source[0] = ANCHOR.sub(r"(\1)=", text)


def relinked(text: str, own: Path, shown_in: Path) -> str:
    """Links of the file `own` as the page `shown_in` must write them."""

    def link(match: re.Match) -> str:
        before, target, after = match.groups()
        if "://" in target or target.startswith(("mailto:", "data:")):
            return match[0]
        return before + new_target(own.parent / target, target, shown_in) + after

    return IMAGE.sub(link, LINK.sub(link, text))


def new_target(file: Path, written: str, shown_in: Path) -> str:
    """Of a page its path, of another file `source:PATH`; what does not exist stays, and fails the build. A
    notebook that is no page is read as the `.py` that it is made of."""
    path = os.path.normpath(file)
    inside = os.path.relpath(path, ROOT)
    page = DOCS / PAGES[inside] if inside in PAGES else Path(path)
    if not page.exists():
        return written
    if page.is_relative_to(DOCS) and page.is_file():
        return os.path.relpath(page, shown_in.parent)
    return f"source:{inside.replace('.ipynb', '.py')}"


# ---- Files of the repository -------------------------------------------------------------------------------


def resolve_sources(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """`source:decoders/phi.py#L216-L236` -> the page of that file, at that line."""
    wanted = app.env.__dict__.setdefault("source_files", set())
    for node in doctree.findall(nodes.reference):
        target = node.get("refuri", "")
        if not target.startswith("source:"):
            continue
        path, _, lines = target.removeprefix("source:").partition("#")
        wanted.add(path.rstrip("/"))
        line = f"#line-{lines[1:].split('-')[0]}" if lines.startswith("L") else ""
        node["refuri"] = app.builder.get_relative_uri(name, page_of(path)) + line


def page_of(path: str) -> str:
    return f"source/{path.rstrip('/')}"


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file or folder that is linked, and for each file of such a folder."""
    wanted = set(getattr(app.env, "source_files", ()))
    folders = {path for path in wanted if (ROOT / path).is_dir()}
    wanted |= {f"{folder}/{file}" for folder in folders for file in files_of(ROOT / folder)}
    for path in sorted(wanted):
        body = folder_list(app, path) if path in folders else file_text(path)
        yield page_of(path), {"title": path, "body": f"<h1>{escape(path)}</h1>{body}"}, "page.html"


def files_of(folder: Path) -> list[str]:
    """Its files and those below, hidden ones and caches left out."""
    found = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return [str(file) for file in found if not any(part[0] in "._" for part in file.parts[:-1])]


def folder_list(app: Sphinx, path: str) -> str:
    entries = []
    for file in files_of(ROOT / path):
        target = app.builder.get_relative_uri(page_of(path), page_of(f"{path}/{file}"))
        entries.append(f'<li><a href="{target}">{escape(file)}</a></li>')
    return f"<ul>{''.join(entries)}</ul>"


def file_text(path: str) -> str:
    """With numbers of lines, each an anchor."""
    file = ROOT / path
    data = file.read_bytes()
    if len(data) > MOST or b"\0" in data:
        return f"<p>{len(data):,} bytes, which are not shown here.</p>"
    text = data.decode("utf-8")
    try:
        lexer = get_lexer_for_filename(path)
    except ClassNotFound:
        lexer = TextLexer()
    form = HtmlFormatter(linenos="inline", anchorlinenos=True, lineanchors="line", linespans="row")
    return f'<div class="source-file">{highlight(text, lexer, form)}</div>'


# ---- Docstrings --------------------------------------------------------------------------------------------


def docstring(app: Sphinx, kind: str, name: str, what: Any, options: Any, lines: list[str]) -> None:
    """Markdown of the kind that our docstrings have, as reStructuredText: `code`, and indented blocks."""
    result: list[str] = []
    in_block = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not in_block:
            result += ["", ".. code-block:: default", ""]  # Python where it is Python
        if in_block and line and not indented:
            result.append("")
        in_block = indented or (in_block and not line)
        begins_list = line.startswith("- ") and result and not result[-1].startswith(("- ", "  "))
        result += [""] if begins_list else []
        result.append(line if in_block else inline(line))
    lines[:] = [*result, ""]


def inline(line: str) -> str:
    """One line outside of blocks: single backquotes are code, and nothing else is markup."""
    parts = re.split(r"`([^`]+)`", line)
    plain = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2]]
    code = [f"\\ ``{part}``\\ " for part in parts[1::2]]
    return "".join(part for pair in zip(plain, [*code, ""], strict=True) for part in pair)


# ---- Slides ------------------------------------------------------------------------------------------------


def write_slides(app: Sphinx, error: Exception | None) -> None:
    from examples.slides import deck

    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "slides.html").write_text(deck(), "utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read_page)
    app.connect("doctree-resolved", resolve_sources)
    app.connect("html-collect-pages", source_pages)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("build-finished", write_slides)
    return {"parallel_read_safe": False}
