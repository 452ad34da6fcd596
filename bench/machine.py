"""What a measurement stands on: which machine, how fast it reads memory, and whether it is quiet.

    python -m bench.machine         # what there is to see now

A machine is quiet when nothing else keeps its processors busy (other guests of a shared host included: what
Linux calls stolen time), and plain reading of memory is near the best that was ever seen on it.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).parent / "results.json"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
OTHERS = 0.1  # cores that others may use
NEAR = 0.8  # of the best reading


class Seen(NamedTuple):
    """Cores that others keep busy, GB/s of plain reading, and the best of it so far."""

    others: float
    reading: float
    best: float

    def is_quiet(self) -> bool:
        return self.others <= OTHERS and self.reading >= NEAR * self.best

    def __str__(self) -> str:
        share = self.reading / self.best
        reading = f"memory reads {self.reading:.0f} GB/s ({share:.0%} of the best)"
        return f"others use {self.others:.2f} cores, {reading}"


def name() -> str:
    """The processor, and how many of its cores are here."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1] for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].strip() if names else model
    return f"{model}, {os.cpu_count()} cores"


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_speed() -> float:
    """GB/s of memory that this machine reads: the fastest of three ways to go through 2 GB, medians."""
    data = torch.ones(500_000_000)
    row, table = torch.ones(1, 5000), data.view(-1, 5000)
    product = torch.ops.mkldnn._linear_pointwise
    ways = (data.sum, data.amax, lambda: product(row, table, None, "none", [], ""))
    return max(2.0 / statistics.median(seconds(way) for _ in range(7)) for way in ways)


def busy_ticks() -> int:
    """Of all processors since the start: all but idle and waiting; stolen ones too."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4]


def others(watched: float = 1.0) -> float:
    """Cores that are busy while this process sleeps for so many seconds."""
    before = busy_ticks()
    taken = seconds(lambda: time.sleep(watched))
    return (busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / taken


class QuietMachine:
    """Knows the best reading: that of results.json if it is of this machine, or a better one since."""

    def __init__(self, results: Path = RESULTS):
        recorded = json.loads(results.read_text()) if results.exists() else {}
        self.best = recorded.get("read_speed", 0.0) if recorded.get("machine") == name() else 0.0

    def see(self) -> Seen:
        busy, reading = others(), read_speed()
        self.best = max(self.best, reading)
        return Seen(busy, reading, self.best)

    def wait(self, patience: float) -> Seen:
        """What was seen when it was quiet. SystemExit where it does not become so in `patience` seconds."""
        end = time.monotonic() + patience
        while not (seen := self.see()).is_quiet():
            print(f"waiting: {seen}", file=sys.stderr, flush=True)
            if time.monotonic() > end:
                raise SystemExit(f"not quiet after {patience:.0f} s: {seen}; --anyway measures all the same")
            time.sleep(5)
        return seen


if __name__ == "__main__":
    print(f"{name()}: {QuietMachine().see()}")
