"""docs/reading/ says what is true: names, lines, quoted code, pictures, and what experiments print."""

import re
import shlex
from pathlib import Path

import pytest

from decoders.cli import parser
from examples.experiments import EXPERIMENTS
from tests import reading

READING = Path(__file__).parent.parent / "docs" / "reading"
QUOTED = re.compile(r"```python\n(.*?)```", re.S)
QUESTIONS = sorted({name for page in reading.PAGES for name, _ in reading.PRINTED.findall(page.read_text())})


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
    assert len(QUOTED.findall(text)) >= 2
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
    }
    assert sorted(EXPERIMENTS) == QUESTIONS
    assert (
        all(function.__doc__.count("?") for name, function in EXPERIMENTS.items() if name != "patch")
        and EXPERIMENTS["patch"].__doc__
    )


@pytest.mark.ecosystem
@pytest.mark.parametrize("name", QUESTIONS)
def test_experiments_print_what_the_pages_say(name):
    quoted = [
        shown
        for page in reading.PAGES
        for one, shown in reading.PRINTED.findall(page.read_text())
        if one == name
    ]
    assert quoted == [reading.printed(name)], "python -m tests.reading --write"


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
