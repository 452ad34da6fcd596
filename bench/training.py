"""Training at gpt-neo-125m's size: a step of examples/train.py beside one of Transformers' Trainer.

    python -m bench.training        # the two rows alone, with processor seconds beside

A process for each holds a model of its own and makes a step when it is asked to, in turns. Both learn float32
weights by AdamW from the same crops, with products in bfloat16 (autocast): the same rate, betas, decay and
clipping. Peak memory is what a process had at most, less what it had with its libraries imported.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

B, T = 1, 1024
SIZE = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "attention_types": [[["global", "local"], 6]]}
QUICK = {"hidden_size": 96, "num_layers": 2, "num_heads": 6, "attention_types": [[["global", "local"], 1]]}
RATE, DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)
STEPS = 1000  # more than anybody asks for


# ---- The process of one side -------------------------------------------------------------------------------


class Clock:
    """Waits for a line before each step, and prints afterwards what the step took."""

    def __init__(self, at_start: int):
        self.at_start = at_start

    def wait(self) -> None:
        import time

        if not sys.stdin.readline():
            sys.exit()
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def report(self, loss: float) -> None:
        import time

        from decoders.cli import peak_memory

        found = {"wall": time.perf_counter() - self.wall, "processor": time.process_time() - self.processor}
        print(json.dumps(found | {"memory": peak_memory() - self.at_start, "loss": loss}), flush=True)


def crops() -> Any:
    """(STEPS, T) ids, the same for both: a text of words as frequent as words are."""
    import torch

    draw = torch.Generator().manual_seed(0)
    chances = 1 / torch.arange(1, 50258.0)
    return torch.multinomial(chances, STEPS * B * T, replacement=True, generator=draw).view(-1, T)


def ours(config: dict) -> None:
    import torch

    from decoders import gpt_neo
    from decoders.cli import peak_memory
    from examples.train import Loss, optimizer_of, train_step

    clock = Clock(peak_memory())
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(("resid_dropout", "embed_dropout", "attention_dropout"), 0.0)
    module = Loss(gpt_neo.GPTNeoForCausalLM(gpt_neo.GPTNeoConfig(**config, **no_dropout))).train()
    optimizer = optimizer_of(module.model)
    for ids in crops().split(B):
        clock.wait()
        loss = train_step(module, [(ids, ids, {})], optimizer, RATE / 1.001, 0.0, 1e-3, autocast=True)
        clock.report(loss)


def theirs(config: dict) -> None:
    import tempfile

    from transformers import GPTNeoConfig, GPTNeoForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from decoders.cli import peak_memory

    clock = Clock(peak_memory())

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.wait()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **more: Any) -> None:
            if logs and "loss" in logs:
                clock.report(logs["loss"])

    no_dropout = dict.fromkeys(("resid_dropout", "embed_dropout", "attention_dropout"), 0.0)
    model = GPTNeoForCausalLM(GPTNeoConfig(**config, **no_dropout))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=B, max_steps=STEPS, learning_rate=RATE,
            lr_scheduler_type="constant", weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
            max_grad_norm=1.0, bf16=True, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in crops()]
        Trainer(model, arguments, train_dataset=rows, callbacks=[Turns()]).train()


# ---- Both --------------------------------------------------------------------------------------------------


def start(side: str, size: str) -> Callable[[], dict]:
    """A function that has the process of a side make a step."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    process = subprocess.Popen([sys.executable, "-m", "bench.training", side, size], **pipes)

    def step() -> dict:
        process.stdin.write("\n")
        while line := process.stdout.readline():
            if line.startswith('{"wall"'):  # the Trainer prints its own lines too
                return json.loads(line)
        raise SystemExit(f"the process of {side} ended: its message stands above")

    step.process = process  # type: ignore[attr-defined]
    return step


def measure(rounds: int, size: str) -> dict[str, list[dict]]:
    """Steps of both, in turns; the first two of each warm up. SystemExit where they do not learn alike."""
    sides = {side: start(side, size) for side in ("ours", "theirs")}
    found: dict[str, list[dict]] = {side: [] for side in sides}
    try:
        for _ in range(rounds + 2):
            for side, step in sides.items():
                found[side].append(step())
    finally:
        for step in sides.values():
            step.process.kill()  # type: ignore[attr-defined]
    a, b = (found[side][-1]["loss"] for side in sides)
    if abs(a - b) > 0.05 * b:
        raise SystemExit(f"training: losses of {a} and {b} after {rounds + 2} steps")
    return {side: steps[2:] for side, steps in found.items()}


def ratio(found: dict[str, list[dict]], key: str) -> float:
    """Median over pairs of theirs / ours."""
    return statistics.median(b[key] / a[key] for a, b in zip(found["ours"], found["theirs"], strict=True))


def training_rows(rounds: int, layers: int) -> Iterator[dict]:
    """Speed and memory of a step at gpt-neo-125m's size; of a tiny one where two layers are asked for."""
    if find_spec("accelerate") is None:  # which Trainer needs
        print("no row for training: pip install accelerate", file=sys.stderr)
        return
    size = "quick" if layers <= 2 else "size"
    found = measure(rounds, size)
    name = "gpt-neo-125m's size: training" if size == "size" else "tiny: training"
    a, b = (statistics.median(B * T / step["wall"] for step in found[side]) for side in found)
    row = f"{name}, {B} x {T} tokens, float32 with products in bfloat16, against Trainer"
    yield {"row": row, "unit": "tok/s", "ours": a, "theirs": b, "ratio": ratio(found, "wall")}
    a, b = (found[side][-1]["memory"] / 1e9 for side in found)
    yield {"row": f"{name}, peak memory", "unit": "GB", "ours": a, "theirs": b, "ratio": b / a}


def main() -> None:
    if sys.argv[1:2] in (["ours"], ["theirs"]):
        side = {"ours": ours, "theirs": theirs}[sys.argv[1]]
        side({"size": SIZE, "quick": QUICK}[sys.argv[2]])
        return
    found = measure(int(sys.argv[1]) if sys.argv[1:] else 5, "size")
    for side, steps in found.items():
        taken = ", ".join(f"{step['wall']:.2f} ({step['processor']:.2f})" for step in steps)
        print(f"{side}: {taken} s (of a processor), peak {steps[-1]['memory'] / 1e9:.2f} GB")
    print(f"ratio: {ratio(found, 'wall'):.2f}, of processor seconds {ratio(found, 'processor'):.2f}")


if __name__ == "__main__":
    main()
