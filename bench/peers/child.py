"""The process of one engine: `python -m bench.peers.child KIND FOLDER BITS --threads N`, or `... --serve`.

It prints one JSON object. With --serve it first prints "ready", then one object for each line of standard
input: the tokens a second of reading a prompt of 256 tokens and of writing 48.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench.peers.engines import CLASSES
from bench.peers.folders import MAKERS
from bench.peers.models import VOCAB

PROMPT, NEW = 256, 48  # of a text with --serve


class Lengths(argparse.Namespace):
    short: int
    long: int
    steps: int
    without_long: bool


def measure(kind: str, folder: Path, bits: str, threads: int, lengths: Lengths) -> dict[str, Any]:
    """What one engine does, once."""
    import torch

    expected = torch.load(folder / "expected.pt")
    ids = token_ids(lengths.long)
    Path("/proc/self/clear_refs").write_text("5")  # the largest memory from here on
    start = time.perf_counter()
    engine = CLASSES[kind](folder, bits, threads)
    engine.read(ids[:16])
    result = {"first": time.perf_counter() - start, **engine.extra}
    logits = getattr(engine, "logits", engine.read)(expected["ids"][0].tolist())
    exact = expected["logits"].double()
    result["error"] = ((torch.as_tensor(logits).double() - exact).norm() / exact.norm()).item()
    engine.read(ids[: lengths.short])  # the first one makes memory
    start = time.perf_counter()
    engine.read(ids[: lengths.short])
    result["prefill"] = lengths.short / (time.perf_counter() - start)
    result["decode 512"] = step_rate(engine, ids[: lengths.steps])
    if not lengths.without_long:
        engine.grow(ids, lengths.short + lengths.steps)
        result["decode 1900"] = step_rate(engine, ids[: lengths.steps])
    status = Path("/proc/self/status").read_text()
    result["memory"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return result


def token_ids(n: int) -> list[int]:
    import torch

    return torch.randint(5, VOCAB, (n,), generator=torch.Generator().manual_seed(2)).tolist()


def step_rate(engine: Any, ids: list[int]) -> float:
    """Tokens a second by the median step."""
    times = []
    for token in ids:
        start = time.perf_counter()
        engine.step(token)
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def serve(kind: str, folder: Path, bits: str, threads: int) -> None:
    """All steps of a text count, the slow ones too: beside others it is these that decide."""
    engine, ids = CLASSES[kind](folder, bits, threads), token_ids(PROMPT + NEW)
    for warm in (ids[:PROMPT], ids[:PROMPT]):
        engine.read(warm)
        engine.step(ids[0])
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        engine.read(ids[:PROMPT])
        prompt_read = time.perf_counter()
        for token in ids[PROMPT:]:
            engine.step(token)
        written = time.perf_counter()
        rates = {"prefill": PROMPT / (prompt_read - start), "decode": NEW / (written - prompt_read)}
        print(json.dumps(rates), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=CLASSES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("bits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short", type=int, default=512)
    parser.add_argument("--long", type=int, default=1900)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--without-long", action="store_true")
    parser.add_argument("--convert", action="store_true", help="make the engine's files, and no more")
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args(namespace=Lengths())
    if args.kind in MAKERS:
        MAKERS[args.kind](args.folder, args.bits)  # before any clock runs
    if args.convert:
        return
    if args.serve:
        serve(args.kind, args.folder, args.bits, args.threads)
    else:
        print(json.dumps(measure(args.kind, args.folder, args.bits, args.threads, args)))


if __name__ == "__main__":
    main()
