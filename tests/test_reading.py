"""docs/reading/ says what is true: names, lines, quoted code, pictures, and what experiments print."""

import re
import shlex
from pathlib import Path

import pytest

from decoders.cli import parser
from examples.experiments import EXPERIMENTS
from examples.solutions import SOLUTIONS
from tests import reading

READING = Path(__file__).parent.parent / "docs" / "reading"
QUOTED = re.compile(r"```python\n(.*?)```", re.S)
BLOCKS = [
    (page.stem, *block) for page in reading.PAGES for block in reading.PRINTED.findall(page.read_text())
]
QUESTIONS = {"experiments": EXPERIMENTS, "solutions": SOLUTIONS}
COURSE = ("diffs", "solutions")  # pages about all six


@pytest.mark.parametrize("page", reading.PAGES, ids=lambda page: page.stem)
def test_names_have_their_lines(page):
    text = page.read_text()
    assert reading.with_lines(text) == text, "python -m tests.reading --write"
    for target in re.findall(r"\]\(([^)#:]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
        assert (READING / target).exists(), target


@pytest.mark.parametrize(
    "page", [page for page in reading.PAGES if page.stem not in ("README", "six")], ids=lambda page: page.stem
)
def test_quoted_code_is_in_what_is_named_before_it(page):
    """Line by line, in order; a page names what it quotes from in the paragraph above, or the one before."""
    text = page.read_text()
    assert len(QUOTED.findall(text)) >= 2 or page.stem in COURSE
    for match in QUOTED.finditer(text):
        *_, (name, module) = reading.NAMED.findall(text[: match.start()])
        lines = iter([line.strip() for line in reading.source(name, module)[0]])
        for line in match[1].splitlines():
            assert line.strip() in lines, f"{name} has no line {line.strip()}"


def test_every_model_has_a_page_and_every_experiment_a_place():
    assert {page.stem for page in reading.PAGES} == {
        "README",
        "six",
        "gpt_neo",
        "openai_gpt",
        "phi",
        "phi3",
        "persimmon",
        "fuyu",
        "masks",
        "cache",
        *COURSE,
    }
    for module, functions in QUESTIONS.items():
        assert sorted(functions) == sorted({name for _, kind, name, _ in BLOCKS if kind == module})
    assert (
        all(function.__doc__.count("?") for name, function in EXPERIMENTS.items() if name != "patch")
        and EXPERIMENTS["patch"].__doc__
    )


def test_every_question_has_a_solution():
    """By the name of its page: the first words of each question, and one "try yourself" for each page with one."""
    sections = (READING / "solutions.md").read_text().split("\n## ")[1:]
    pages = [p for p in reading.PAGES if "\nTry yourself:" in p.read_text()]
    assert len(sections) == len(pages) == 8
    for page in pages:
        text = page.read_text()
        anchor = re.search(r"\[Solution\]\(solutions\.md#([\w-]+)\)", text)[1]
        (section,) = [s for s in sections if heading_anchor(s) == anchor]
        asked = re.findall(r"Question: (.*?\?)\*\*", text, re.S)
        assert section.count("\n**") >= len(asked) + 1, page.stem
        assert section.count("\n**Try yourself:") == 1, page.stem


def heading_anchor(section: str) -> str:
    return re.sub(r"[^\w -]", "", section.splitlines()[0].lower()).replace(" ", "-")


@pytest.mark.parametrize("page", reading.PAGES, ids=lambda page: page.stem)
def test_diffs_are_those_of_the_files(page):
    text = page.read_text()
    assert reading.with_diffs(text) == text, "python -m tests.reading --write"
    assert (text.count("<!-- diff ") >= 9) == (page.stem == "diffs")


@pytest.mark.ecosystem
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}: {block[2]}")
def test_experiments_print_what_the_pages_say(block):
    _, module, name, shown = block
    assert shown == reading.printed(module, name), "python -m tests.reading --write"


def test_the_snippet_runs(monkeypatch, capsys):
    monkeypatch.chdir(READING.parent.parent)
    (snippet,) = QUOTED.findall((READING / "README.md").read_text())
    exec(compile(snippet, "README", "exec"), {})
    assert "torch.Size([1, 4, 13, 13])" in capsys.readouterr().out


def test_commands_are_commands():
    """What the guide tells to type can be typed."""
    text = (READING / "README.md").read_text()
    (command,) = re.findall(r"^python -m decoders (.*)$", text, re.M)
    assert parser().parse_args(shlex.split(command)).command == "look"
