"""The site that `make docs` builds: no warning, every link leads somewhere, nothing comes from elsewhere."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

for module in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(module, reason="pip install -r requirements-docs.txt")

pytestmark = pytest.mark.ecosystem
NOT_LOADED = {"a", "link rel=canonical"}  # elements whose address is followed by people only


class Page(HTMLParser):
    """What a page links to, what it loads, and which places it has."""

    def __init__(self, file: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        for name in ("href", "src", "srcset"):
            if given.get(name):
                (self.links if tag == "a" else self.loads).append(given[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as `make docs` does: warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", folder / "trees"]
    done = subprocess.run(
        [*command, "-c", "docs/site", "docs", folder / "html"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {file: Page(file) for file in site.rglob("*.html")}


def test_every_page_of_docs_is_there(site):
    for file in (ROOT / "docs").rglob("*.md"):
        assert (site / file.relative_to(ROOT / "docs")).with_suffix(".html").exists(), file


def test_every_link_leads_to_a_page_and_a_place_in_it(pages):
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            place = unquote(parts.fragment)
            if not target.is_file() or (place and target in pages and not is_place(place, pages[target])):
                broken.append((file.name, link))
    assert broken == []


def is_place(name: str, page: Page) -> bool:
    return name in page.places or name in ("", "top") or name.isdigit()  # digits: a slide


def test_the_notebooks_are_pages_with_their_outputs(site, pages):
    """In the list of pages; they were shown as JSON."""
    first = Page(site / "index.html")
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"site/notebooks/{file.stem}.html" in first.links
        text = (site / "site" / "notebooks" / f"{file.stem}.html").read_text("utf-8")
        outputs = [
            one for cell in json.loads(file.read_text("utf-8"))["cells"] for one in cell.get("outputs", ())
        ]
        assert text.count("what the cell draws") == sum("image/png" in one.get("data", {}) for one in outputs)
        assert "&quot;cell_type&quot;" not in text


def test_what_a_command_prints_is_not_coloured_as_python(site):
    text = (site / "porting.html").read_text("utf-8")
    output = re.search(r"<pre>[^\n]*First difference.*?</pre>", text.replace("<span></span>", ""), re.S)
    assert output and "<span" not in output[0]
    assert re.search(r'class="highlight-python[^>]*>.*?<span class="k', text, re.S)


def test_a_link_to_a_line_leads_to_that_line(site):
    """The lines themselves are kept true by test_reading.py."""
    page = Page(site / "reading" / "masks.html")
    (link,) = {one for one in page.links if "phi.py" in one and one.endswith("#line-216")}
    assert "line-216" in Page(site / "reading" / link.split("#")[0]).places


def test_nothing_is_loaded_from_elsewhere(pages):
    for file, page in pages.items():
        away = [one for one in page.loads if "//" in one.split("data:")[0]]
        assert away == [], file


def test_the_reference_has_what_the_doors_offer(site):
    from decoders import compare, decoding, look

    for room in (decoding, compare, look):
        name = room.__name__.rpartition(".")[2]
        text = (site / "reference" / f"{name}.html").read_text("utf-8")
        for offered in room.__all__:
            if callable(getattr(room, offered)) and getattr(room, offered).__doc__:
                assert f'.{offered}"' in text, offered


def test_the_search_finds_without_a_server(site):
    """Its index is a script, which a browser also loads from a folder."""
    index = (site / "searchindex.js").read_text("utf-8")
    assert index.startswith("Search.setIndex(")
    assert "nucleu" in index
