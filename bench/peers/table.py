"""The tables and the picture of docs/speed.md."""

import re
import statistics
from typing import Any

from bench.page import digits
from bench.peers.engines import ENGINES

Results = dict[str, dict[str, Any]]  # engine -> what it did, medians
SPEEDS = "decode 512", "decode 1900", "prefill"
SAME_BITS = {  # what is compared -> ours, and the peers
    "16 bits": ("ours bfloat16", "BF16$|bfloat16$"),
    "8 bits": ("ours int8", "int8$|Q8_0$"),
    "4 bits": ("ours int4", "int4$|Q4_0$|Q4_K_M$"),
    "llama.cpp's Q8_0 file, of llama.cpp's own speed": ("ours, llama.cpp's Q8_0 file", "llama.cpp Q8_0$"),
    "llama.cpp's Q4_0 file, of llama.cpp's own speed": ("ours, llama.cpp's Q4_0 file", "llama.cpp Q4_0$"),
    "GPTQ, of llama.cpp's Q4_0": ("ours, GPTQ folder of 4 bits", "llama.cpp Q4_0$"),
}


def medians(runs_of: dict[str, list[dict]]) -> Results:
    """Of each engine, in the order of ENGINES, with the number of its runs."""
    known = [engine for engine in ENGINES if engine in runs_of]
    return {engine: {**median_of(runs_of[engine]), "runs": len(runs_of[engine])} for engine in known}


def median_of(runs: list[dict]) -> dict[str, Any]:
    """Of each figure, over the runs that have it."""
    first = {key: value for run in reversed(runs) for key, value in run.items()}
    return {
        key: value if isinstance(value, str) else statistics.median(run[key] for run in runs if key in run)
        for key, value in first.items()
    }


def table(name: str, results: Results) -> list[str]:
    ours = results.get("ours bfloat16", {})
    lines = [
        f"| {name} | decode at 512 | at 1,900 | prefill of 512 | to the first token | memory | error "
        "| runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine, one in results.items():
        cells = [speed_cell(one, ours, key) for key in SPEEDS]
        cells += [f"{one['first']:.1f} s", f"{one['memory'] / 1e9:.2f} GB", f"{one['error']:.3f}"]
        version = f" {one['version']}" if "version" in one else ""
        lines.append(f"| {engine}{version} | {' | '.join(cells)} | {one['runs']} |")
    return lines


def speed_cell(one: dict[str, Any], ours: dict[str, Any], key: str) -> str:
    if key not in one or key not in ours:
        return "-"
    return f"{digits(one[key])} tok/s ({one[key] / ours[key]:.2f})"


def ratio_cell(own: dict[str, Any], peers: list[dict[str, Any]], key: str) -> str:
    rates = [one[key] for one in peers if key in one]
    return f"{own[key] / max(rates):.2f}" if rates and key in own else "-"


def against_the_best(results: Results) -> list[str]:
    """Ours over the fastest engine of as many bits, each figure by itself."""
    lines = ["| ours, of the best peer's | decode at 512 | at 1,900 | prefill of 512 |", "|---|---|---|---|"]
    for label, (own, pattern) in SAME_BITS.items():
        peers = [one for name, one in results.items() if re.search(pattern, name) and "ours" not in name]
        if own in results and peers:
            ratios = [ratio_cell(results[own], peers, key) for key in SPEEDS]
            lines.append(f"| {label} | {' | '.join(ratios)} |")
    return lines


def page(results: dict[str, Results], seen: list[str]) -> str:
    """What stands between the markers of docs/speed.md: what the rounds saw, and the tables of each model."""
    lines = [f"Round {i + 1} began when {one}." for i, one in enumerate(seen)]
    for name, one in results.items():
        lines += ["", *table(name, one), "", *against_the_best(one)]
    return "\n".join([*lines, ""])
