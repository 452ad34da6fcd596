"""docs/decoding.md: its snippets and commands run as they stand."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "decoding.md").read_text("utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.S))
def test_the_python_runs(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")


@pytest.mark.parametrize("script", re.findall(r"```bash\n(.*?)```", PAGE, re.S))
def test_the_commands_run(script, tmp_path):
    """In a folder of their own, so that they leave nothing here."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    script = script.replace("python -", f"PYTHONPATH={ROOT} {sys.executable} -")
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
