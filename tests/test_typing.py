"""What a user's editor says of his script: nothing of a right one, and where the mistakes are of a wrong one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

USER = Path(__file__).parent / "typing_user"


def mypy_lines(file: Path) -> dict[int, str]:
    """Line -> message of what mypy finds in `file`."""
    pytest.importorskip("mypy")
    options = ["--follow-imports=silent", "--ignore-missing-imports", "--no-error-summary", "--config-file="]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(file)], capture_output=True, text=True, cwd=ROOT
    )
    assert not found.stderr, found.stderr
    errors = re.findall(r"^.*\.py:(\d+): error: (.*)$", found.stdout, re.M)
    return {int(line): message for line, message in errors}


def pyright_lines(file: Path) -> dict[int, str]:
    """The same of pyright, which the package `pyright` fetches when it first runs."""
    pytest.importorskip("pyright")
    found = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    try:
        listed = json.loads(found.stdout)["generalDiagnostics"]
    except ValueError:
        pytest.skip(
            f"pyright cannot run here, it needs Node and its own files: {found.stderr.strip()[-200:]}"
        )
    errors = [one for one in listed if one["severity"] == "error"]
    return {one["range"]["start"]["line"] + 1: one["message"] for one in errors}


@pytest.mark.parametrize("checker", [mypy_lines, pyright_lines], ids=["mypy", "pyright"])
def test_a_right_script_has_no_errors(checker):
    assert checker(USER / "right.py") == {}


@pytest.mark.parametrize("checker", [mypy_lines, pyright_lines], ids=["mypy", "pyright"])
def test_a_wrong_script_has_its_errors_where_they_are(checker):
    lines = (USER / "wrong.py").read_text().splitlines()
    wanted = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    found = checker(USER / "wrong.py")
    assert found.keys() == wanted, found
    misspelt = next(number for number, line in enumerate(lines, 1) if "max_new_token=" in line)
    assert "max_new_token" in found[misspelt]
