"""Decoding on a busy machine. As many processes as there are processors run endless loops, in a session of
their own, as another user's would. Each engine is measured alone and beside them, in turns.

    python -m bench.busy --folders F --write        # the table of docs/speed.md
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench import machine
from bench.page import digits, write_table
from bench.peers.models import GPT_NEO, LAYERS, prepare
from bench.peers.processes import Served, convert, python_of

PASSIVE = {"OMP_WAIT_POLICY": "passive"}
WITHOUT = {"DECODERS_NATIVE": "0"}
ENDLESS = """
import ctypes, os, signal
for _ in range({}):
    if not os.fork():
        break
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent, stopped or not
while True:
    pass
"""
SIZE = {GPT_NEO: "gpt-neo-125m's size", "phi-2": "phi-2's width, 8 layers"}


class Row(NamedTuple):
    model: str
    engine: str
    label: str = ""
    own: dict[str, str] = {}  # noqa: RUF012  (environment variables; nobody writes to it)
    threads: int = machine.CORES


ROWS = [
    Row(GPT_NEO, "ours bfloat16"),
    Row(GPT_NEO, "ours bfloat16", "OMP_WAIT_POLICY=passive", PASSIVE),
    Row(GPT_NEO, "ours bfloat16", "one thread", threads=1),
    Row(GPT_NEO, "ours bfloat16", "PyTorch's operators", WITHOUT),
    Row(GPT_NEO, "ours bfloat16", "PyTorch's operators, passive", {**WITHOUT, **PASSIVE}),
    Row(GPT_NEO, "ours int8"),
    Row(GPT_NEO, "Transformers bfloat16"),
    Row(GPT_NEO, "Transformers bfloat16", "OMP_WAIT_POLICY=passive", PASSIVE),
    Row("phi-2", "ours int8"),
    Row("phi-2", "ours int8", "OMP_WAIT_POLICY=passive", PASSIVE),
    Row("phi-2", "llama.cpp Q8_0"),
]
Rates = dict[tuple[str, str], float]  # (prefill or decode, alone or beside) -> tokens a second, median


class Others:
    """Endless processes, stopped until they are wanted."""

    def __init__(self, count: int):
        code = ENDLESS.format(count - 1)
        self.process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        self.signal(signal.SIGSTOP)

    def signal(self, which: signal.Signals) -> None:
        os.killpg(self.process.pid, which)

    @contextmanager
    def running(self) -> Iterator[None]:
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


def measure(rows: list[Row], folders: Path, rounds: int, layers: dict[str, int]) -> dict[int, Rates]:
    """Index of the row -> its rates; rows whose engine is not installed, or fails, are left out. All rows of
    a model in turns."""
    results = {}
    for model in dict.fromkeys(row.model for row in rows):
        folder = folders / f"{model}-{layers[model]}"
        prepare(model, folder, layers[model])
        for i, rates in measure_model(
            [(i, r) for i, r in enumerate(rows) if r.model == model], folder, rounds
        ):
            results[i] = rates
    return results


def measure_model(rows: list[tuple[int, Row]], folder: Path, rounds: int) -> Iterator[tuple[int, Rates]]:
    with ExitStack() as stack:
        others = Others(machine.CORES)
        stack.callback(others.end)
        served = {}
        for i, row in rows:
            if python_of(row.engine) and convert(row.engine, folder, row.threads, limit=600):
                served[i] = Served(row.engine, folder, row.threads, **row.own)
                stack.callback(served[i].end)
        served = {i: one for i, one in served.items() if one.is_ready}
        texts: dict[int, list[tuple[dict, dict]]] = {i: [] for i in served}
        for _ in range(rounds):
            for i, one in served.items():
                alone = one.write_a_text()
                with others.running():
                    texts[i].append((alone, one.write_a_text()))
        for i, pairs in texts.items():
            yield (
                i,
                {
                    (what, where): statistics.median(pair[n][what] for pair in pairs)
                    for what in ("decode", "prefill")
                    for n, where in enumerate(("alone", "beside"))
                },
            )


def table(results: dict[int, Rates]) -> str:
    lines = [
        "Medians, in turns:",
        "",
        "| tokens a second | decode alone | beside others | ratio | prompt alone | beside others | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, rates in results.items():
        row = ROWS[i]
        cells = [f"{SIZE[row.model]}: {row.engine}{row.label and ', '}{row.label}"]
        for what in ("decode", "prefill"):
            alone, beside = rates[what, "alone"], rates[what, "beside"]
            cells += [digits(alone), digits(beside), f"{beside / alone:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def readme_rows(rounds: int, layers: int) -> Iterator[dict]:
    """Ours and Transformers at gpt-neo-125m's size, alone and beside others."""
    rows = [Row(GPT_NEO, "ours bfloat16"), Row(GPT_NEO, "Transformers bfloat16")]
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = measure(rows, Path(folder), rounds, {GPT_NEO: min(12, layers)}).values()
    for where, label in (("alone", ""), ("beside", f", beside {machine.CORES} endless processes")):
        a, b = ours["decode", where], theirs["decode", where]
        row = f"{SIZE[GPT_NEO]}, bfloat16: decode at 256{label}"
        yield {"row": row, "unit": "tok/s", "ours": a, "theirs": b, "ratio": a / b}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folders", type=Path, help="as of bench.peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two layers and one round: does it run?")
    parser.add_argument("--write", action="store_true", help="the table into docs/speed.md")
    args = parser.parse_args()
    layers = dict.fromkeys(LAYERS, 2) if args.quick else LAYERS
    with ExitStack() as stack:
        folders = args.folders or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        text = table(measure(ROWS, folders, 1 if args.quick else args.rounds, layers))
    print(text)
    if args.write:
        write_table("busy", text)


if __name__ == "__main__":
    main()
