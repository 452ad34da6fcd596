"""How a training begins, stops and goes on: what `examples/train.py` checks, keeps, and finds again."""

import argparse
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from decoders import formats

# What makes a training another one: not how long it lasts, nor how fast it learns.
SETTINGS = ("family", "text", "start", "lora", "width", "layers", "heads", "context", "vocab")


def settings_of(a: argparse.Namespace) -> dict[str, str]:
    """The text and the start as whole paths: the same command goes on in another folder too."""
    values = {name: getattr(a, name) for name in SETTINGS}
    return {name: str(v.resolve() if isinstance(v, Path) else v) for name, v in values.items()}


def check_arguments(a: argparse.Namespace) -> None:
    """ValueError for numbers with which nothing can be trained."""
    for name in ("width", "layers", "heads", "context", "vocab", "batch_size", "accumulate"):
        if getattr(a, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(a, name)}")
    for name in ("steps", "lora"):
        if getattr(a, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, not {getattr(a, name)}")
    for name in ("minutes", "learning_rate"):
        if not getattr(a, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(a, name)}")
    if a.width % (2 * a.heads):
        raise ValueError(f"--heads {a.heads} do not fit --width {a.width}: heads are of one, even, size")


def prompt_ids(a: argparse.Namespace, tokenizer: Any) -> list[int]:
    """Of the samples' beginning. ValueError for one that leaves no room, before anything is trained."""
    ids = tokenizer.encode(a.prompt)
    if not 0 < len(ids) < a.context:
        raise ValueError(
            f"--prompt has {len(ids)} tokens: give 1 or more, and fewer than --context {a.context}"
        )
    return ids


def saved_training(a: argparse.Namespace) -> dict[str, Any] | None:
    """The state in --out that this training goes on from; None where it begins. ValueError where --out holds
    something else, which it would replace."""
    file = a.out / "training.pt"
    if not file.exists():
        if holds_model(a.out):
            raise ValueError(f"{a.out} holds a model, and no training.pt to go on from: give another --out")
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)  # also one that a GPU has begun
        before = state.get("settings", {})
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError):
        raise ValueError(f"{file} is no training to go on from: give another --out") from None
    now = settings_of(a)
    if other := [name for name in SETTINGS if before.get(name) != now[name]]:
        what = ", ".join(f"{name} {before.get(name)}, not {now[name]}" for name in other)
        raise ValueError(
            f"{a.out} holds a training of {what}: give another --out (and --start {a.out}, to begin there)"
        )
    return state


def holds_model(folder: Path) -> bool:
    """Of a try that failed there is a config that names the family and nothing else."""
    named = set(formats.read_json_if_any(folder / "config.json"))
    return named > {"model_type"} or (folder / "model.safetensors").exists()


@contextmanager
def interrupts(then: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C calls `then`, so that a step and a save are ended first; pressed again it is as ever."""
    before = signal.getsignal(signal.SIGINT)

    def press(*_: Any) -> None:
        then()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def save_training(file: Path, state: dict[str, Any]) -> None:
    """As a whole, or OSError and the file as it was."""
    try:
        formats.write_file(file, lambda out: torch.save(state, out))
    except RuntimeError as error:  # of torch.save on a full disk, whose own error it hides
        raise OSError(f"{file} cannot be written: {error.__context__ or error}") from None
