"""This tree and an earlier commit in turns: `python -m bench --against COMMIT [--write]`.

The other tree is a worktree of its own. A process for each holds the same model with the same random
weights, and does what it is told to. So both see the same machine; medians are compared. The last column is
this tree's step over its bare products: every weight matrix once, in the same process.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PROMPT, NEW, LONG = 64, 64, 512
NEO = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "attention_types": [[["global", "local"], 6]]}
PHI15 = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "vocab_size": 51200}
PHI2 = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "vocab_size": 51200,
}
EIGHT = {"num_hidden_layers": 8}
UNITS = {"text": "tok/s", "beams": "steps/s", "lookup": "tok/s", "prompt": "tok/s"}
LABELS = {
    "text": "text",
    "beams": "beams of 4",
    "lookup": "prompt lookup, 11 of 12 tokens quoted",
    "prompt": f"prompt of {LONG}",
}


class Case(NamedTuple):
    """A model, and what it does: keys of LABELS."""

    module: str
    class_name: str
    config: Any  # a folder of checkpoints, or the fields that differ from the defaults
    dtype: str
    quantization: str | None
    does: tuple[str, ...] = ("text",)


ALL = ("text", "beams", "lookup")
GPT_NEO = ("gpt_neo", "GPTNeoForCausalLM")
PHI3 = ("phi3", "Phi3ForCausalLM")
MODELS = {
    "gpt-neo-125m's size, int8": Case(*GPT_NEO, NEO, "bfloat16", "int8", ALL),
    "gpt-neo-125m's size, bfloat16": Case(*GPT_NEO, NEO, "bfloat16", None, ALL),
    "tiny-gpt-neo": Case(*GPT_NEO, "checkpoints/tiny-gpt-neo", "float32", None),
    "tiny-phi3": Case(*PHI3, "checkpoints/tiny-phi3", "float32", None),
    "openai-gpt's size, float32": Case("openai_gpt", "OpenAIGPTLMHeadModel", {}, "float32", None),
    "phi-1.5's size, int8": Case("phi", "PhiForCausalLM", PHI15, "bfloat16", "int8"),
    "phi-2's width, 8 layers, int4": Case(
        "phi", "PhiForCausalLM", PHI2, "bfloat16", "int4", ("text", "prompt")
    ),
    "Phi-3-mini's width, 8 layers, int4": Case(*PHI3, EIGHT, "bfloat16", "int4", (*ALL, "prompt")),
    "Phi-3-mini's width, 8 layers, bfloat16": Case(*PHI3, EIGHT, "bfloat16", None, ("text", "prompt")),
    "Phi-3-mini, 32 layers, int4": Case(*PHI3, {}, "bfloat16", "int4"),
}


# ---- The process of a tree ---------------------------------------------------------------------------------


def build(case: Case) -> Any:
    """Its model, with the tree's own code."""
    import importlib

    import torch

    from decoders import kernels, weights

    model_class = getattr(importlib.import_module(f"decoders.{case.module}"), case.class_name)
    if isinstance(case.config, str):
        return weights.load(model_class, ROOT / case.config)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**case.config))
    model = model.to(getattr(torch, case.dtype)).to_empty(device="cpu").eval()
    fill(model)
    if case.quantization:
        kernels.quantize(model, case.quantization)
    return kernels.prepare(model)


def fill(model: Any) -> None:
    """The same million random numbers over and over: time does not depend on them, and it is soon done."""
    import torch

    with suppress(AttributeError):
        model.tie_weights()  # apart after `to_empty`
    numbers = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for part in parameter.data.view(-1).split(2**20):
            part.copy_(numbers[: len(part)])


def wait_for_the_compiler() -> None:
    """Later trees compile in the background."""
    with suppress(ImportError, AttributeError):
        from decoders.kernels import native

        native.wait()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Clock:
    """Tokens, or steps, a second between the first that is heard of and the last: as a streamer, or of beams,
    which none can follow, as a stopping criterion."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, int]] = []  # when, and how many there were then

    def put(self, new: Any) -> None:
        count = self.heard[-1][1] + len(new) if self.heard else 0  # at first the prompt
        self.heard.append((time.perf_counter(), count))

    def end(self) -> None:
        pass

    def __call__(self, ids: Any, scores: Any) -> bool:
        self.heard.append((time.perf_counter(), ids.shape[1]))
        return False

    def rate(self) -> float:
        heard = self.heard if self.heard[0][1] else self.heard[1:]
        (start, first), (end, last) = heard[0], heard[-1]
        return (last - first) / (end - start)


def measures(model: Any) -> dict[str, Callable[[], float]]:
    """What the process can be told to do: each gives tokens, or steps, a second."""
    import torch

    from bench.decoding import quoting, scripted
    from decoders import decoding

    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (1, PROMPT), generator=generator)
    long = torch.randint(3, vocab, (1, LONG), generator=generator)
    common = {"eos_token_id": None, "pad_token_id": 0}
    quote = {"logits_processor": [scripted(quoting(long, vocab), LONG)], "prompt_lookup_num_tokens": 8}
    options = {"text": {}, "beams": {"num_beams": 4}, "lookup": quote}

    def generate(what: str, prompt: Any, max_new_tokens: int) -> float:
        clock = Clock()
        listener = {"stopping_criteria": [clock]} if what == "beams" else {"streamer": clock}
        decoding.generate(model, prompt, max_new_tokens=max_new_tokens, **common, **listener, **options[what])
        return clock.rate()

    def prompt() -> float:
        with torch.inference_mode():
            return LONG / seconds(lambda: model(long, logits_to_keep=1, use_cache=True))

    calls = {what: partial(generate, what, long, NEW // 2) for what in ("beams", "lookup")}
    calls["text"] = partial(generate, "text", ids, NEW)
    return {**calls, "prompt": prompt, "step": partial(step, model, ids), "bare": partial(bare, model)}


def step(model: Any, ids: Any) -> float:
    """Steps a second of the model alone, by the median step."""
    import torch

    with torch.inference_mode():
        cache, token = model(ids, use_cache=True).past_key_values, ids[:, :1]
        run = partial(model, token, past_key_values=cache, use_cache=True)
        return 1 / statistics.median(seconds(run) for _ in range(48))


def bare(model: Any) -> float:
    """Steps a second if a step were one product with every weight matrix and nothing else."""
    import torch

    kinds = ("Linear", "Conv1D", "Quantized")
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    dtype, widths = next(model.parameters()).dtype, set(map(inputs_of, layers))
    rows = {width: torch.randn(1, 1, width).to(dtype) for width in widths}
    with torch.inference_mode():
        times = [seconds(lambda: [layer(rows[inputs_of(layer)]) for layer in layers]) for _ in range(24)]
    return 1 / statistics.median(times)


def inputs_of(layer: Any) -> int:
    return layer.weight.shape[0] if type(layer).__name__ == "Conv1D" else layer.in_features


def serve(name: str) -> None:
    """Does what each line of standard input says; a first time as well, before it is ready."""
    wait_for_the_compiler()
    model = build(MODELS[name])
    calls = measures(model)
    for what in MODELS[name].does:
        calls[what]()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(calls[line.strip()]()), flush=True)


# ---- Both --------------------------------------------------------------------------------------------------


class Tree:
    """The process of a tree with a model."""

    def __init__(self, path: Path, name: str):
        environment = {**os.environ, "PYTHONPATH": str(path)}
        command = [sys.executable, str(Path(__file__)), name]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, cwd=path, bufsize=1, **pipes)
        if self.line() != "ready\n":
            raise SystemExit(f"{path} cannot run {name}")

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def do(self, what: str) -> float:
        assert self.process.stdin
        self.process.stdin.write(f"{what}\n")
        return float(self.line())


def compare(earlier: Path, name: str, rounds: int) -> Iterator[str]:
    """The lines of a model: medians of `rounds`, in turns."""
    trees = [Tree(path, name) for path in (earlier, ROOT)]
    for what in MODELS[name].does:
        rates: list[list[float]] = [[], []]
        for i in range(rounds):
            for which in (0, 1) if i % 2 else (1, 0):
                rates[which].append(trees[which].do(what))
        before, now = map(statistics.median, rates)
        share = f"{over_bare(trees[1], rounds):.2f}" if what == "text" else ""
        label = f"{name}: {LABELS[what]}"
        cells = f"{before:.4g} {UNITS[what]} | {now:.4g} {UNITS[what]} | {now / before:.2f} | {share}"
        yield f"| {label} | {cells} |"
    for tree in trees:
        tree.process.communicate()


def over_bare(tree: Tree, rounds: int) -> float:
    """The time of a step over that of its bare products, in turns."""
    return statistics.median(tree.do("bare") / tree.do("step") for _ in range(rounds))


def main(commit: str, rounds: int, write: bool) -> None:
    """A table of all models, on standard output; what there is of it where somebody interrupts."""
    lines = ["Two trees in turns, medians:", ""]
    lines += [f"| | {commit} | now | ratio | step / bare products |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, commit], check=True)
        try:
            for name in MODELS:
                for line in compare(tree, name, rounds):
                    print(line, flush=True)
                    lines.append(line)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
            if write:
                from bench.page import write_table  # not of the earlier tree

                write_table("against", "\n".join([*lines, ""]))


if __name__ == "__main__":
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench"]
    serve(sys.argv[1])
