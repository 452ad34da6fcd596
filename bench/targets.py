"""The kernels for lesser processors, measured on a better one: `python -m bench.targets --write`.

A step of one token with the instructions of a target beside one with PyTorch's operators, which are held to
the same instructions. A process for each with the same random weights, one thread, in turns; processor
seconds of the fastest of twelve steps, medians of the turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bench.against import GPT_NEO, NEO, PHI3, Case, build
from bench.page import digits, write_table

LOWERED = {  # PyTorch's own, oneDNN's and MKL's instructions
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
}
PROMPT, STEPS = 128, 12
KINDS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "int8": ("bfloat16", "int8"),
    "int8-weights": ("bfloat16", "int8-weights"),
    "int4": ("bfloat16", "int4"),
}
SIZES: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "gpt-neo-125m's size": (GPT_NEO, NEO),
    "Phi-3-mini's width, 2 layers": (PHI3, {"num_hidden_layers": 2}),
}
CASES = {
    f"{size}, {kind}": Case(*model, config, *stored)
    for size, (model, config) in SIZES.items()
    for kind, stored in KINDS.items()
}


def serve(name: str) -> None:
    """The processor seconds of a step, for each line of standard input; a step before it is ready."""
    import torch

    from decoders.kernels import native

    torch.set_num_threads(1)
    native.wait()
    model = build(CASES[name])
    ids = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        run = partial(model, ids[:, :1], past_key_values=cache, use_cache=True)
        run()
        print(native.operators(), flush=True)
        for _ in sys.stdin:
            print(min(cpu_seconds(run, STEPS)), flush=True)
            cache.truncate(PROMPT)


def cpu_seconds(run: Callable[[], object], steps: int) -> list[float]:
    """Of each of `steps` calls, or of fewer that take a second together."""
    times: list[float] = []
    while len(times) < steps and sum(times) < 1:
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return times


def started(name: str, native: str, target: str) -> subprocess.Popen:
    """A process that serves one of CASES."""
    own = {"DECODERS_NATIVE": native, "OMP_NUM_THREADS": "1", **LOWERED[target]}
    command = [sys.executable, "-W", "ignore", "-m", "bench.targets", "--serve", name]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, **own}, bufsize=1, **pipes)
    expected = "PyTorch's operators" if native == "0" else f"{target} kernels"
    if line_of(process) != expected:
        raise SystemExit(f"no {expected} here")
    return process


def line_of(process: subprocess.Popen) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip()


def asked(process: subprocess.Popen) -> float:
    assert process.stdin
    process.stdin.write("\n")
    return float(line_of(process))


def rows(target: str, names: list[str], rounds: int) -> Iterator[str]:
    yield f"| | {target} kernels | PyTorch's operators | ratio |"
    yield "|---|---|---|---|"
    for name in names:
        both = [started(name, native, target) for native in (target, "0")]
        times = [[asked(process) for process in both] for _ in range(rounds)]
        for process in both:
            process.communicate()
        ours, theirs = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        yield f"| {name} | {digits(ours)} ms | {digits(theirs)} ms | {theirs / ours:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default="AVX2", choices=LOWERED)
    parser.add_argument("--case", action="append", choices=CASES, help="this one only; several times: these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="the table into docs/speed.md")
    parser.add_argument("--serve", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    lines = []
    for line in rows(args.target, args.case or list(CASES), args.rounds):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write_table("targets", "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
