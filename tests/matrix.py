"""The versions of others that are promised: each in an environment of its own, with the tests that lean on it.

    make versions                                   all of them, into docs/versions.md: long, and gigabytes
    python -m tests.matrix transformers==5.24.0     these alone
    python -m tests.matrix --python PATH            in an environment that is there already

A row says how many tests passed with one package in one version, all others as they are pinned.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
MARKS = "<!-- matrix -->", "<!-- end of matrix -->"
HF = ["test_hf.py", "test_hf_caches.py", "test_hf_generate.py", "test_hf_encodings.py", "test_hf_manners.py"]
FILES = {  # package -> the tests that lean on it
    "transformers": [*HF, "test_hf_text.py", "test_parity.py", "test_generation.py"],
    "torch": ["test_parity.py", "test_properties.py", "test_kernels.py", "test_quantize.py", *HF],
    "safetensors": ["test_weights.py", "test_saving.py"],
    "tiktoken": ["test_tokenize.py"],
    "sentencepiece": ["test_tokenize.py"],
    "huggingface_hub": ["test_hub.py"],
    "pillow": ["test_fuyu.py"],
    "h5py": ["test_weights.py"],
}
NEWEST = ["transformers==5.23.0", "transformers==5.24.0", "torch==2.14.1", "torch==2.13.0"]


def lowest() -> list[str]:
    """The bounds of pyproject.toml, each as the version it begins with."""
    text = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text))
    return [f"{name}=={bounds[name]}" for name in FILES if name in bounds and name != "transformers"]


def environment(pins: str, folder: Path) -> Path:
    """The Python of a new environment with what is pinned, but for `pins`."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "-r", str(ROOT / "requirements-test.txt")], check=True)
    subprocess.run([*install, "peft", "accelerate"], check=True)
    subprocess.run([*install, pins], check=True)
    return python


def run(python: str | Path, files: list[str]) -> str:
    """Example: "1,204 passed, 3 failed"."""
    names = [str(Path("tests") / name) for name in files]
    command = [str(python), "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *names]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    counts = dict.fromkeys(("passed", "failed", "error"), 0)
    for symbol, name in ((".", "passed"), ("F", "failed"), ("E", "error")):
        rows = re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", answer.stdout, re.MULTILINE)
        counts[name] = sum(row.count(symbol) for row in rows)
    if not counts["passed"]:
        return f"does not run: {(answer.stdout + answer.stderr).strip().splitlines()[-1]:.80}"
    return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n or name != "error")


def table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| version | tests | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write(rows: list[tuple[str, str, str]]) -> None:
    """The table into the page, between its marks."""
    page = PAGE.read_text()
    begin, end = (page.index(mark) for mark in MARKS)
    PAGE.write_text(f"{page[: begin + len(MARKS[0])]}\n{table(rows)}\n{page[end:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="*", help="as transformers==5.24.0; left out, all")
    parser.add_argument("--python", help="an environment that is there already, with the version named")
    parser.add_argument("--write", action="store_true", help="the table into docs/versions.md")
    options = parser.parse_args()
    rows = []
    for version in options.versions or [*NEWEST, *lowest()]:
        files = FILES[version.partition("==")[0]]
        with tempfile.TemporaryDirectory(prefix="decoders-matrix-") as folder:
            python = options.python or environment(version, Path(folder))
            rows.append((version, ", ".join(name.removesuffix(".py") for name in files), run(python, files)))
        print(*rows[-1], sep="  ", flush=True)
    if options.write:
        write(rows)


if __name__ == "__main__":
    main()
