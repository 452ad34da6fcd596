"""The pictures of docs/reading/: pages of the tiny checkpoints, and what a headless browser shows of them.

    python -m examples.pictures                      # all of them, into docs/reading/
    python -m examples.pictures --pages /tmp/pages   # the pages only, to open and walk through in a lesson

A picture is a view of a page at a chosen token, layer and head, as its address says: page.html#lens;token=5.
Other pages come by `python -m decoders look`. Needs Chromium and `pip install playwright`; the pages do not.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from decoders import look, model_class, read_config, weights
from decoders.cli import main as decoders
from decoders.look.diagram import plan
from decoders.look.drawing import ROW, STYLE, WIDTH, drawing
from examples.browser import NoBrowser, browser

ROOT = Path(__file__).parent.parent
READING, CHECKPOINTS = ROOT / "docs" / "reading", ROOT / "checkpoints"
NAMES = ("gpt-neo", "openai-gpt", "phi", "phi3", "persimmon", "fuyu")
STORY = "Once upon a time there was a fox. The fox"
FUYU = CHECKPOINTS / "tiny-fuyu"
PAGES = {
    **{name: [str(CHECKPOINTS / f"tiny-{name}"), STORY, "--max-new-tokens", "30"] for name in NAMES[:5]},
    "fuyu": [str(FUYU), "where is the red circle?", "--image", str(FUYU / "shapes.png")],
    "two": [
        str(CHECKPOINTS / "tiny-gpt-neo"),
        "Once upon a time there was a fox. The",
        "--with",
        "Once upon a time there was a bear. The",
        "--max-new-tokens",
        "0",
    ],
}


class Shot(NamedTuple):
    """What to see of a page: `part` is an element, "" all that fits into the window."""

    page: str
    address: str
    part: str = ""
    scheme: str = "light"
    width: int = 1180
    height: int = 1000


SHOTS = {
    "look-light": Shot("phi3", "text;token=8;layer=1;head=2"),
    "look-dark": Shot("phi3", "text;token=8;layer=1;head=2", scheme="dark"),
    "look-narrow": Shot("phi3", "text;token=8;layer=1;head=2", width=390, height=1000),
    "gpt-neo": Shot("gpt-neo", "attention;token=37;layer=1;head=1", "#attention .panes"),
    "openai-gpt": Shot("openai-gpt", "block;token=10;layer=1;box=norm_1", "#block .panes"),
    "phi": Shot("phi", "block;token=12;layer=1;box=add_2", "#block .panes"),
    "phi3": Shot("phi3", "attention;token=10;layer=0;head=2", "#attention .panes"),
    "persimmon": Shot("persimmon", "block;token=13;layer=1;box=act", "#block .panes"),
    "fuyu": Shot("fuyu", "picture;token=32", "#picture"),
    "lens": Shot("gpt-neo", "lens;token=10", "#lens"),
    "writers": Shot("persimmon", "writers;token=13", "#writers"),
    "two": Shot("two", "difference;token=9", "#difference"),
}


def pages(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in PAGES.items():
        if decoders(["look", *arguments, "-o", str(folder / f"{name}.html")]):
            raise ValueError(f"no page of {name}")


def blocks() -> str:
    """The six blocks side by side, in two rows, as one SVG."""
    drawings, x, y, width, height = [], 0, 0, 0, 0
    for i, name in enumerate(NAMES):
        if i == 3:
            x, y = 0, height + 20
        folder = CHECKPOINTS / f"tiny-{name}"
        model = weights.load(model_class(read_config(folder)), folder)
        picture = drawing(model, 1, standalone=False, title=f"tiny-{name}")
        p = plan(model, 1)
        drawings.append(picture.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1).replace(' tabindex="0"', ""))
        x += int((p.columns - 0.35) * WIDTH) + 80
        width, height = max(width, x), max(height, y + p.rows * ROW + 12)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{"".join(drawings)}</svg>\n'


def shoot(opened, folder: Path, name: str, shot: Shot, target: Path) -> None:
    page = opened.new_page(viewport={"width": shot.width, "height": shot.height}, color_scheme=shot.scheme)
    page.goto(f"{(folder / shot.page).with_suffix('.html').as_uri()}#{shot.address}")
    page.wait_for_selector("#block .code .on")
    page.wait_for_timeout(300)
    page.evaluate("document.querySelector('nav').style.position = 'static'")
    if shot.part:
        page.locator(shot.part).first.screenshot(path=target / f"{name}.png")
    else:
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=target / f"{name}.png")
    page.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="The pictures of docs/reading/.")
    parser.add_argument("--pages", type=Path, metavar="DIR", help="write the pages there, and no pictures")
    parser.add_argument("--only", nargs="*", choices=SHOTS, help="some of the pictures")
    args = parser.parse_args()
    if args.pages:
        pages(args.pages)
        return 0
    READING.mkdir(parents=True, exist_ok=True)
    look.write(READING / "blocks.svg", blocks())
    with tempfile.TemporaryDirectory() as folder:
        pages(Path(folder))
        try:
            with browser() as opened:
                for name in args.only or SHOTS:
                    shoot(opened, Path(folder), name, SHOTS[name], READING)
                    print(READING / f"{name}.png")
        except NoBrowser as error:
            print(f"no pictures: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
