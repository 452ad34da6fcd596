"""A step over a long text with keys and values of 16 bits and of 8: `python -m bench.cache --write`.

Phi-3-mini's width, 8 layers, bfloat16; random keys and values. In turns in one process, medians.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from bench.against import fill
from bench.page import digits, write_table
from decoders import kernels, phi3
from decoders.formats.config import cache_shape
from decoders.kernels import native

KINDS = {"16 bits": None, "8 bits": "int8"}
STEPS = 4  # before the cache is cut back


def make_model(layers: int) -> Any:
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(phi3.Phi3Config(num_hidden_layers=layers, sliding_window=None))
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    fill(model)
    return kernels.prepare(model)


def filled(model: Any, kind: str | None, length: int) -> Any:
    """A cache of random keys and values, with room for more."""
    layers, heads, D = cache_shape(model.config)
    cache, draw = kernels.new_cache(model, kind), torch.Generator().manual_seed(0)
    for layer in range(layers):
        k, v = (torch.randn(1, heads, length, D, generator=draw).bfloat16() for _ in "kv")
        cache.update(layer, k, v)
    return cache


def step_time(model: Any, cache: Any, length: int) -> float:
    """Seconds of a step, by the median of a few."""
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - start)
    cache.truncate(length)
    return statistics.median(times)


@torch.inference_mode()
def rows(layers: int, lengths: tuple[int, ...], rounds: int) -> list[str]:
    model = make_model(layers)
    lines = [
        "Steps a second, medians in turns:",
        "",
        "| tokens in the cache | 16 bits | 8 bits | ratio |",
        "|---|---|---|---|",
    ]
    for length in lengths:
        caches = [filled(model, kind, length) for kind in KINDS.values()]
        for cache in caches:
            step_time(model, cache, length)  # the buffers grow once, and the plan is made
        times = [[step_time(model, cache, length) for cache in caches] for _ in range(rounds)]
        a, b = (statistics.median(column) for column in zip(*times, strict=True))
        lines.append(f"| {length:,} | {digits(1 / a)} tok/s | {digits(1 / b)} tok/s | {a / b:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one layer and short texts: does it run?")
    parser.add_argument("--write", action="store_true", help="the table into docs/speed.md")
    args = parser.parse_args()
    native.wait()
    layers, lengths = (1, (64, 256)) if args.quick else (8, (4096, 16384))
    text = "\n".join([*rows(layers, lengths, args.rounds), ""])
    print(text)
    if args.write:
        write_table("cache", text)


if __name__ == "__main__":
    main()
