"""The reading guide as slides: one HTML file that needs no network, from the pages of docs/reading.

    python -m examples.slides                     # out/slides.html
    python -m examples.slides -o lesson.html

A slide for each numbered paragraph, each question and each diff; what a question prints is shown at the
second key. Arrow keys, Home and End; D for dark; print gives a page a slide. Needs `requirements-docs.txt`.
"""

import argparse
import base64
import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
READING = ROOT / "docs" / "reading"
TEMPLATE = Path(__file__).with_suffix(".html")
CHAPTERS = "README six openai_gpt gpt_neo phi persimmon fuyu phi3 masks cache diffs".split()
ROOM = 22  # lines of a slide, about
BEGIN = ("heading", "numbered", "question", "try", "picture")  # kinds of blocks that begin a slide
KINDS = {"png": "image/png", "svg": "image/svg+xml"}


class Block(NamedTuple):
    """One paragraph, list, table, picture or piece of code."""

    html: str
    lines: float  # the room that it takes, about
    kind: str = ""  # "title", "heading", "numbered", "question", "try", "code", "picture", or nothing

    @property
    def leads(self) -> bool:
        """Whether it announces what follows."""
        return self.html.rstrip().endswith(":</p>")


class Slide(NamedTuple):
    page: str  # the page's title
    blocks: list[Block]


# ---- Blocks of a page --------------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a Markdown page, in order, as HTML without links that lead away."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True, "highlight": highlighted}).enable("table")
    tokens = parser.parse(text)
    start = 0
    for i, token in enumerate(tokens):
        if token.level or token.nesting == 1:
            continue
        own = tokens[start : i + 1]
        shown = parser.renderer.render(own, parser.options, {})
        start = i + 1
        if not shown.startswith("<!--"):
            yield block(own[0], shown)


def block(first, shown: str) -> Block:
    if first.type == "fence":
        return Block(shown, 0.75 * (shown.count("\n") + 1), "code")
    if first.type == "heading_open":
        return Block(shown, 3, "title" if first.tag == "h1" else "heading")
    text = re.sub(r"<[^>]+>", "", shown)
    if "<img" in shown:
        return Block(pictures_inside(shown), 17, "picture")
    if first.type == "table_open":
        return Block(with_places(shown), 2 * shown.count("<tr>"))
    kind = ""
    if "Question: <strong>" in shown:
        kind = "question"
    elif re.match(r"<p><strong>\d+\.", shown):
        kind = "numbered"
    elif text.startswith("Try yourself"):
        kind = "try"
    shown = with_places(shown)
    if kind in ("question", "try"):
        shown = shown.replace(" Solution.", "")
        shown = shown.replace("<p>", f'<p class="{kind}">', 1)
    return Block(shown, len(text) / 85 + 0.7, kind)


def with_places(shown: str) -> str:
    """Links to a file as its name and line, links to a page as links to its slide, others as they are."""

    def link(match: re.Match) -> str:
        target, text = match.groups()
        if place := re.search(r"/(\w+\.\w+)(?:#L(\d+))?", target if target.startswith("..") else ""):
            line = f":{place[2]}" if place[2] else ""
            return f'{text} <span class="source">{place[1]}{line}</span>' if line else text
        page = re.fullmatch(r"(\w+)\.md(?:#.*)?", target)
        if page and page[1] in CHAPTERS:
            return f'<a href="#{page[1]}">{text}</a>'
        return text if not target.startswith("http") else match[0]

    return re.sub(r'<a href="([^"]*)">(.*?)</a>', link, shown, flags=re.S)


def pictures_inside(shown: str) -> str:
    """Pictures as part of the file."""

    def inside(match: re.Match) -> str:
        file = READING / match[1]
        kind = KINDS[file.suffix[1:]]
        return f'src="data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}" class="page"'

    return re.sub(r'src="([^"]+)"', inside, re.sub(r' width="\d+"', "", shown))


# ---- Code --------------------------------------------------------------------------------------------------


def highlighted(code: str, language: str, attributes: str) -> str:
    """Keywords, strings and comments of Python; what a diff takes away and adds."""
    if language == "diff":
        lines = "\n".join(map(diff_line, code.splitlines()))
        return f"<pre>{lines}</pre>\n"
    if language != "python":
        return ""  # the parser's own
    from pygments.lexers import PythonLexer
    from pygments.token import Comment, Keyword, String

    parts = []
    for kind, text in PythonLexer().get_tokens(code):
        name = "k" if kind in Keyword else "s" if kind in String else "c" if kind in Comment else ""
        text = html.escape(text)
        parts.append(f'<span class="{name}">{text}</span>' if name else text)
    return f"<pre>{''.join(parts).rstrip()}</pre>\n"


def diff_line(line: str) -> str:
    name = {"+": "plus", "-": "minus"}.get(line[:1])
    text = html.escape(line)
    return f'<span class="{name}">{text}</span>' if name else text


# ---- Slides ------------------------------------------------------------------------------------------------


def slides(page: Path) -> Iterator[Slide]:
    """A new one for a title, a heading, a number, a question, and for what the last has no room for."""
    text = page.read_text("utf-8")
    found = list(blocks(text.split("\n## ")[0] if page.stem == "README" else text))
    title = re.sub(r"<[^>]+>", "", found[0].html).strip()
    own: list[Block] = []
    for one in found:
        if own and begins_slide(one, own):
            carried = own[-1:] if one.kind not in BEGIN and len(own) > 1 and own[-1].leads else []
            yield Slide(title, own[: len(own) - len(carried)])
            own = carried
        own.append(one)
    yield Slide(title, own)


def begins_slide(one: Block, own: list[Block]) -> bool:
    """Whether a block stands on a slide of its own, not on that of the blocks before it."""
    if own[0].kind == "title":
        return len(own) > 1 or one.kind != ""  # a title keeps its first paragraph
    if own[-1].kind == "heading":
        return False
    return one.kind in BEGIN or sum(each.lines for each in own) + one.lines > ROOM


def as_html(slide: Slide, number: int, name: str) -> str:
    """A section; what a question's code prints is hidden until the next key."""
    kinds = [one.kind for one in slide.blocks]
    is_title = kinds[0] == "title"
    parts = []
    for i, one in enumerate(slide.blocks):
        later = "question" in kinds[:i]
        parts.append(f'<div class="later">{one.html}</div>' if later else one.html)
    attributes = f' id="{name}" class="title"' if is_title else ""
    head = "" if is_title else f'<div class="head">{slide.page}</div>'
    foot = f'<div class="foot">{number}</div>'
    return f'<section{attributes}>{head}<div class="fit">{"".join(parts)}</div>{foot}</section>'


def deck() -> str:
    """The whole file."""
    sections: list[str] = []
    for name in CHAPTERS:
        for slide in slides(READING / f"{name}.md"):
            sections.append(as_html(slide, len(sections) + 1, name))
    return TEMPLATE.read_text("utf-8").replace("{slides}", "\n".join(sections))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "out" / "slides.html")
    output = parser.parse_args().output
    try:
        text = deck()
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install -r requirements-docs.txt", file=sys.stderr)
        return 2
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, "utf-8")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
