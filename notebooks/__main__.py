"""Makes every notebook of this folder out of the .py beside it, and runs it.

    python -m notebooks                        # all, and their solutions: a few minutes
    python -m notebooks phi solutions/phi      # some of them

The .py files are in jupytext's percent format: edit them, or the notebook in Jupyter with jupytext. Needs
what `make ecosystem` installs.
"""

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat
from traitlets.config import Config

FOLDER = Path(__file__).parent
OTHERS = {"__init__", "__main__", "tools"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources(names: list[str]) -> list[Path]:
    """The .py files of those that are asked for, or of all. ValueError for an unknown name."""
    files = [f for f in sorted(FOLDER.rglob("*.py")) if f.stem not in OTHERS]
    known = {str(f.relative_to(FOLDER).with_suffix("")): f for f in files}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no notebook is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def notebook_of(source: Path) -> nbformat.NotebookNode:
    """The cells of a .py, without outputs: the same text gives the same file."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat_minor = 5
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.NotebookNode()
    return notebook


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same with outputs. CellExecutionError where a cell fails."""
    with tempfile.TemporaryDirectory() as sockets:  # not over the network
        kernels = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        client = nbclient.NotebookClient(
            notebook,
            config=kernels,
            timeout=600,
            record_timing=False,
            resources={"metadata": {"path": str(FOLDER)}},
        )
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # on small matrices two wait for each other
        client.execute(env=one_thread)
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
    return notebook


def main(names: list[str]) -> int:
    try:
        chosen = sources(names)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for source in chosen:
        target = source.with_suffix(".ipynb")
        nbformat.write(executed(notebook_of(source)), target)
        print(f"{target.relative_to(FOLDER)}: {target.stat().st_size / 1e3:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
