"""What the README says is run here, so that it cannot rot."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.families import FAMILIES

README = (ROOT / "README.md").read_text("utf-8")


def test_the_python_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Once upon a time ")


def test_the_command_lines_run():
    for line in re.findall(r"^python -m decoders .*", README, re.M):
        found = subprocess.run(
            [sys.executable, *shlex.split(line)[1:]], capture_output=True, text=True, cwd=ROOT, input="Hi\n"
        )
        written = ROOT / "page.html"  # what look writes instead
        assert found.returncode == 0 and (found.stdout or "-o page.html" in line and written.exists()), line


def test_the_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", README, re.M)) <= targets
    for arguments in re.findall(r"^python -m (decoders|bench|examples\.\w+|tests\.\w+)", README, re.M):
        found = subprocess.run([sys.executable, "-m", arguments, "--help"], capture_output=True, cwd=ROOT)
        assert found.returncode == 0, arguments


def test_the_first_screen_is_short():
    assert len(README.split("## ")[0].splitlines()) <= 45


def test_the_proof_is_the_recorded_one_and_still_true():
    pytest.importorskip("transformers")
    from tests import proof

    results = json.loads(proof.RESULTS.read_text())
    assert proof.table(results) in README, "run python -m tests.proof --write"
    for family in FAMILIES:
        assert proof.difference(family, torch.float32, draws=3) <= 2 * max(
            results[family.name]["float32"].values()
        )
        assert proof.difference(family, torch.float64, draws=3) <= 2 * results[family.name]["float64"] + 1e-12


def test_the_benchmark_is_the_recorded_one():
    from bench import __main__ as bench

    assert bench.table(json.loads(bench.RESULTS.read_text())) in README, "run python -m bench --write"


def test_linked_files_exist():
    for target in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / target).exists(), target
