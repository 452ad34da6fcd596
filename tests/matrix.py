"""The versions of others that are promised: each in an environment of its own, with the tests that lean on it.

    make versions                                            all rows, into docs/versions.md: long, and gigabytes
    python -m tests.matrix transformers==5.24.0 --write      this row alone; the others stay
    python -m tests.matrix torch==2.14.1 --python PATH       in an environment that is there already

A row names what is installed over the versions that this Python has. The row `lowest` starts from nothing: the
packages of pyproject.toml in the lowest version admitted, but torch is 2.13.0, pytest the newest, and ftfy, spacy
and Transformers, which wants newer packages, are left out.
On Linux PyPI has torch built for CUDA: a row of torch other than the pinned one downloads up to three gigabytes.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
MARKS = "<!-- matrix -->", "<!-- end of matrix -->"
DOCUMENTED = ["test_hf_caches", "test_hf_generate", "test_hf_encodings", "test_hf_manners", "test_hf_text"]
FILES = {  # the first word of a row -> the tests that lean on it
    "transformers": [*DOCUMENTED, "test_heads", "test_parity"],
    "torch": ["test_kernels", "test_torch_tools", "test_hf_caches", "test_parity"],
    "lowest": [
        "test_weights",
        "test_saving",
        "test_tokenize",
        "test_hub",
        "test_fuyu",
        "test_openai_gpt",
        "test_gguf",
    ],
}
NEWER = ("2.14.1", "2.13.0", "2.12.1", "2.11.0", "2.10.0", "2.9.1", "2.8.0")
ROWS = [
    *(f"transformers=={version}" for version in ("5.24.0", "5.23.0")),
    *(f"torch=={version}" for version in NEWER),
    "lowest",
]
ELSEWHERE = (
    "torch",
    "transformers",
    "pytest",
    "ftfy",
    "spacy",
)  # not in `lowest`: rows of their own, and tools
TOOLS = ["torch==2.13.0", "pytest", "hypothesis", "jinja2", "regex", "protobuf", "matplotlib"]


def lowest() -> list[str]:
    """The bounds of pyproject.toml, each as the version that it begins with."""
    text = (ROOT / "pyproject.toml").read_text()
    text = text[text.index("\ndependencies") : text.index("\necosystem")]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text))
    return [f"{name}=={version}" for name, version in bounds.items() if name not in ELSEWHERE]


def environment(row: str, folder: Path) -> Path:
    """The Python of a new environment: what this one has, and over it what the row names."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if row == "lowest":
        subprocess.run([*install, *lowest(), *TOOLS], check=True)
        return python
    own = next((folder / "lib").glob("python*")) / "site-packages"
    (own / "below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([*install, row], check=True)
    return python


def run(python: str | Path, files: list[str]) -> str:
    """Example: "1,204 passed, 3 failed"."""
    names = [f"tests/{name}.py" for name in files]
    options = ["-o", "addopts=", "-q", "-p", "no:cacheprovider", "-m", "not proof and not pairs"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [python, "-m", "pytest", *options, *names], cwd=ROOT, capture_output=True, text=True, env=variables
    )
    print(answer.stdout[-3000:], file=sys.stderr)
    return counts(answer.stdout) or f"does not run: {(answer.stdout + answer.stderr).strip()[-80:]}"


def counts(report: str) -> str:
    """Of pytest's last line: how many passed, failed and were skipped."""
    last = report.strip().splitlines()[-1] if report.strip() else ""
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", last)
    return ", ".join(f"{int(n):,} {name}" for n, name in sorted(found, key=lambda pair: pair[1] != "passed"))


# ---- The page ----------------------------------------------------------------------------------------------


def shown(page: str) -> dict[str, str]:
    """The rows of the table, by what is installed."""
    begin, end = (page.index(mark) for mark in MARKS)
    lines = page[begin:end].splitlines()[3:]
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}


def write(rows: dict[str, str]) -> None:
    """These rows into the page, between its marks; all others stay."""
    page = PAGE.read_text()
    known = shown(page) | rows
    order = [*(row for row in ROWS if row in known), *(row for row in known if row not in ROWS)]
    begin, end = (page.index(mark) for mark in MARKS)
    table = "\n".join(["| installed | tests | |", "|---|---|---|", *(known[row] for row in order)])
    PAGE.write_text(f"{page[: begin + len(MARKS[0])]}\n{table}\n{page[end:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help="as transformers==5.24.0; left out, all")
    parser.add_argument("--python", help="an environment that is there already, with what the row names")
    parser.add_argument("--write", action="store_true", help="the rows into docs/versions.md")
    options = parser.parse_args()
    for row in options.rows or ROWS:
        files = FILES[row.partition("==")[0]]
        with tempfile.TemporaryDirectory(prefix="decoders-matrix-") as folder:
            python = options.python or environment(row, Path(folder))
            names = ", ".join(name.removeprefix("test_") for name in files)
            line = f"| {row} | {names} | {run(python, files)} |"
        print(line, flush=True)
        if options.write:
            write({row: line})


if __name__ == "__main__":
    main()
