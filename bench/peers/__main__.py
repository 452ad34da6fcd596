"""Rounds of all engines: `python -m bench.peers`. `bench/peers/__init__.py` says how."""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench.peers
from bench import machine
from bench.page import PAGE, write_table
from bench.peers.engines import ENGINES
from bench.peers.models import LAYERS, NAMES, prepare
from bench.peers.picture import picture
from bench.peers.processes import convert, python_of, run
from bench.peers.table import medians, page

QUICK = ["--short", "64", "--long", "128", "--steps", "4"]
LIMIT = 240  # seconds that one engine may take once; conversions have ten times as much


class Rounds:
    """What was measured: {"seen": [of each round], "runs": {model: {engine: [result]}}}, kept in a file."""

    def __init__(self, args: argparse.Namespace, folders: Path):
        self.args, self.folders = args, folders
        self.layers = {name: 2 if args.quick else LAYERS[name] for name in args.models}
        self.end = time.monotonic() + 60 * args.minutes
        kept = args.keep is not None and args.keep.exists()
        self.data: dict[str, Any] = json.loads(args.keep.read_text()) if kept else {"seen": [], "runs": {}}

    def engines(self) -> Iterator[tuple[str, str]]:
        """(model, engine), of those that are installed."""
        for name in self.args.models:
            for engine in ENGINES:
                is_asked_for = re.search(self.args.only, engine) or engine == "ours bfloat16"
                if is_asked_for and ENGINES[engine].serves(name) and python_of(engine):
                    yield name, engine

    def folder(self, name: str) -> Path:
        return self.folders / f"{name}-{self.layers[name]}"

    def convert(self) -> None:
        """Every engine's files."""
        for name in self.args.models:
            prepare(name, self.folder(name), self.layers[name])
        for name, engine in sorted(self.engines(), key=lambda pair: ENGINES[pair[1]].kind == "packed"):
            convert(engine, self.folder(name), self.args.threads, limit=10 * LIMIT)

    def measure(self, watch: machine.QuietMachine) -> None:
        """All rounds, as long as there is time."""
        for number in range(self.args.rounds):
            seen = watch.see() if self.args.anyway else watch.wait(self.args.patience)
            print(f"round {number + 1}: {seen}", file=sys.stderr, flush=True)
            self.data["seen"].append(str(seen))
            for name, engine in self.engines():
                if time.monotonic() > self.end:
                    print(f"{self.args.minutes:g} minutes are over", file=sys.stderr)
                    return
                self.measure_one(name, engine, number)

    def measure_one(self, name: str, engine: str, number: int) -> None:
        options = QUICK if self.args.quick else []
        if number >= self.args.long_rounds:
            options = [*options, "--without-long"]
        output = run(engine, self.folder(name), self.args.threads, *options, limit=LIMIT)
        if output is None:
            return
        result = json.loads(output.splitlines()[-1])
        self.data["runs"].setdefault(name, {}).setdefault(engine, []).append(result)
        figures = ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))
        print(f"{name} {number + 1}: {engine}: {figures}", file=sys.stderr, flush=True)
        if self.args.keep is not None:
            self.args.keep.write_text(json.dumps(self.data))


def main() -> None:
    parser = argparse.ArgumentParser(description=(bench.peers.__doc__ or "").partition("\n")[0])
    option = parser.add_argument
    option("--threads", type=int, default=os.cpu_count())
    option("--rounds", type=int, default=3)
    option(
        "--long-rounds", type=int, default=1000, metavar="N", help="1,900 tokens in the first N rounds only"
    )
    option("--minutes", type=float, default=60, help="begin no engine later than that")
    option("--only", default="", help="engines that match this pattern, beside our bfloat16")
    option("--models", nargs="*", default=list(NAMES), choices=NAMES)
    option("--folders", type=Path, help="where the engines' files are, or stay")
    option("--keep", type=Path, help="a file for all runs: a later call goes on with it")
    option("--convert", action="store_true", help="make the engines' files, and no more")
    option("--quick", action="store_true", help="two layers and short texts: does it run?")
    option("--patience", type=float, default=600, help="seconds to wait until the machine is quiet")
    option("--anyway", action="store_true", help="measure on a machine that is not quiet too")
    option("--write", action="store_true", help="the table into docs/speed.md")
    args = parser.parse_args()
    for missing in (engine for engine in ENGINES if python_of(engine) is None):
        print(f"{missing}: not installed in .peers/{ENGINES[missing].environment}", file=sys.stderr)
    with ExitStack() as stack:
        folders = args.folders or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rounds = Rounds(args, folders)
        if args.rounds:
            rounds.convert()
        if not args.convert:
            rounds.measure(machine.QuietMachine())
    if not args.convert:
        report(rounds.data, args.write)


def report(data: dict[str, Any], write: bool) -> None:
    """The tables on standard output, and into docs/speed.md."""
    results = {name: medians(runs) for name, runs in data["runs"].items()}
    text = page(results, data["seen"])
    print(text)
    if write:
        write_table("peers", text)
        PAGE.with_suffix(".svg").write_text(picture(results))


if __name__ == "__main__":
    main()
