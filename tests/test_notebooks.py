"""notebooks/: each .ipynb is its .py, executed without an error; and what shows itself in a notebook."""

import re
import textwrap

import pytest

pytestmark = pytest.mark.ecosystem
jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

from notebooks.__main__ import FOLDER, executed, notebook_of, sources  # noqa: E402

SOURCES = {str(f.relative_to(FOLDER).with_suffix("")): f for f in sources([])}
LESSONS = [name for name in SOURCES if "/" not in name]
FAMILIES = {"openai_gpt", "gpt_neo", "phi", "persimmon", "fuyu", "phi3"}


def stored(name: str):
    return nbformat.read(SOURCES[name].with_suffix(".ipynb"), as_version=4)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_is_one_for_each_model_and_one_for_all_with_solutions():
    assert set(LESSONS) == FAMILIES | {"all_six"}
    assert {name.removeprefix("solutions/") for name in SOURCES.keys() - LESSONS} == set(LESSONS)


@pytest.mark.parametrize("name", SOURCES)
def test_a_notebook_has_the_cells_of_its_source(name):
    assert cells(stored(name)) == cells(notebook_of(SOURCES[name])), "make notebooks"


@pytest.mark.parametrize("name", SOURCES)
def test_a_notebook_is_executed_without_errors_and_small(name):
    notebook = stored(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {(output.output_type, output.get("name")) for cell in code for output in cell.outputs}
    assert not {kind for kind in kinds if kind[0] == "error" or kind[1] == "stderr"}
    assert SOURCES[name].with_suffix(".ipynb").stat().st_size < 400_000
    assert len(notebook.cells) <= 60


def quoted(notebook) -> list[tuple[str, str]]:
    """File ("decoders/phi.py") and lines of the source code that stands in outputs."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.data.get("text/markdown", "") for output in outputs if "data" in output]
    return [pair for text in texts for pair in re.findall(r"^`([\w/]+\.py)`\n```python\n(.*)```", text, re.S)]


@pytest.mark.parametrize(
    "name", [name for name in SOURCES if re.search(r"^show\(", SOURCES[name].read_text(), re.M)]
)
def test_source_code_in_outputs_is_that_of_today(name):
    shown = quoted(stored(name))
    assert shown
    for file, lines in shown:
        today = (FOLDER.parent / file).read_text().splitlines()
        indents = {line[: len(line) - len(line.lstrip())] for line in today}
        text = "\n".join(["", *today, ""])
        wanted = ("\n" + textwrap.indent(lines, indent) for indent in indents)
        assert any(each in text for each in wanted), f"{file} has changed: make notebooks"


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_asks_before_it_tells_and_its_exercises_are_solved(name):
    """Questions stand in bold; the titles of three exercises are those of the solutions."""
    text = SOURCES[name].read_text().replace("\n# ", " ")
    assert len(re.findall(r"\*\*[^*]+\?\*\*", text)) >= 6
    asked = re.findall(r"(?:^| )(\d)\. \*\*(.+?)\.?\*\*", text[text.index("## Exercises") :])
    solved = re.findall(r"^# ## (\d)\. (.+)$", SOURCES[f"solutions/{name}"].read_text(), re.M)
    assert len(asked) == 3 and asked == solved


def test_all_begin_by_finding_the_repository():
    first = {next(source for kind, source in cells(stored(name)) if kind == "code") for name in SOURCES}
    assert len(first) == 1 and "hosted notebook" in first.pop()


@pytest.mark.parametrize("name", SOURCES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)", SOURCES[name].read_text()):
        assert (SOURCES[name].parent / target).exists(), target


@pytest.mark.parametrize("name", SOURCES)
def test_every_cell_runs(name):
    """What a lesson states in numbers is asserted in its cells."""
    executed(notebook_of(SOURCES[name]))
