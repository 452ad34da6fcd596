"""Decoding by this tree and by an earlier commit, in turns: `python -m bench --against COMMIT`.

The other tree is a worktree of its own. A process for each holds the same model with the same random
weights, and writes a text when it is told to. So both see the same machine; medians are compared.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROMPT, NEW = 64, 64
NEO = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "attention_types": [[["global", "local"], 6]]}
PHI15 = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "vocab_size": 51200}
EIGHT = {"num_hidden_layers": 8}
MODELS: dict[str, tuple[str, str, Any, str, str | None]] = {
    # module, class, config, dtype, quantization
    "tiny-gpt-neo": ("gpt_neo", "GPTNeoForCausalLM", "checkpoints/tiny-gpt-neo", "float32", None),
    "tiny-phi3": ("phi3", "Phi3ForCausalLM", "checkpoints/tiny-phi3", "float32", None),
    "gpt-neo-125m's size, bfloat16": ("gpt_neo", "GPTNeoForCausalLM", NEO, "bfloat16", None),
    "gpt-neo-125m's size, int8": ("gpt_neo", "GPTNeoForCausalLM", NEO, "bfloat16", "int8"),
    "openai-gpt's size, float32": ("openai_gpt", "OpenAIGPTLMHeadModel", {}, "float32", None),
    "phi-1.5's size, int8": ("phi", "PhiForCausalLM", PHI15, "bfloat16", "int8"),
    "Phi-3-mini's width, 8 layers, int4": ("phi3", "Phi3ForCausalLM", EIGHT, "bfloat16", "int4"),
}


# ---- The process of a tree ---------------------------------------------------------------------------------


def build(name: str) -> Any:
    """One of MODELS, with the tree's own code."""
    import importlib

    import torch

    from decoders import kernels, weights

    module, class_name, config, dtype, kind = MODELS[name]
    model_class = getattr(importlib.import_module(f"decoders.{module}"), class_name)
    if isinstance(config, str):
        return weights.load(model_class, ROOT / config)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config)).to(getattr(torch, dtype)).eval()
    return kernels.prepare(kernels.quantize(model, kind) if kind else model)


def wait_for_the_compiler() -> None:
    """Later trees compile in the background."""
    with suppress(ImportError, AttributeError):
        from decoders.kernels import native

        native.wait()


def serve(name: str) -> None:
    """For each line of standard input the tokens a second of one text."""
    import torch

    wait_for_the_compiler()
    model = build(name)
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def seconds(new: int) -> float:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new, eos_token_id=None)
        return time.perf_counter() - start

    seconds(3)
    print("ready", flush=True)
    for _ in sys.stdin:
        prompt = seconds(1)
        print(json.dumps((NEW - 1) / (seconds(NEW) - prompt)), flush=True)


# ---- Both --------------------------------------------------------------------------------------------------


def start(tree: Path, name: str) -> Callable[[], float]:
    """A function that has the process of a tree write a text."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, str(Path(__file__)), name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    process = subprocess.Popen(command, env=environment, cwd=tree, **pipes)
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"{tree} cannot run {name}")

    def rate() -> float:
        process.stdin.write("\n")
        return float(process.stdout.readline())

    rate.process = process  # type: ignore[attr-defined]
    return rate


def compare(earlier: Path, name: str, rounds: int) -> tuple[float, float]:
    """Tokens a second of the earlier tree and of this one: medians of `rounds`, in turns."""
    both = [start(tree, name) for tree in (earlier, ROOT)]
    taken: list[list[float]] = [[], []]
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            taken[which].append(both[which]())
    for rate in both:
        rate.process.communicate()  # type: ignore[attr-defined]
    return statistics.median(taken[0]), statistics.median(taken[1])


def main(commit: str, rounds: int) -> None:
    """A table of all models, on standard output."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, commit], check=True)
        try:
            print(f"| decoding, tok/s | {commit} | now | ratio |\n|---|---|---|---|", flush=True)
            for name in MODELS:
                before, now = compare(tree, name, rounds)
                print(f"| {name} | {before:.4g} | {now:.4g} | {now / before:.2f} |", flush=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


if __name__ == "__main__":
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench"]
    serve(sys.argv[1])
