"""Kill, watch and double the writer of a folder: python -m tests.fuzz.saves FOLDER --kills 1000 --seed 3

Models of two kinds are saved over each other, of which each number says which kind it is: any mixture shows.
"""

import argparse
import os
import random
import signal
import sys
from itertools import cycle
from pathlib import Path

import torch

from decoders import weights
from decoders.phi import PhiConfig, PhiForCausalLM

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


STEPS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "shutil.copymode",
    "os.chmod",
    "tempfile.mkdtemp",
}
STEPS_OF_TWO_SAVES = 160


def model_of(kind: int) -> PhiForCausalLM:
    """Its config, generation config and weights tell `kind`, as do its width and so the number of shards."""
    model = PhiForCausalLM(PhiConfig(**{**SIZES, "hidden_size": 16 * kind}, eos_token_id=kind))
    model.generation_config = {"eos_token_id": kind, "pad_token_id": kind}
    for p in model.parameters():
        p.data.fill_(float(kind))
    return model


def kind_of(folder: Path) -> int:
    """Which model the folder holds; AssertionError if it holds parts of two."""
    model = weights.load(PhiForCausalLM, folder)
    kind = model.config.eos_token_id
    assert model.config.hidden_size == 16 * kind and model.generation_config == {
        "eos_token_id": kind,
        "pad_token_id": kind,
    }
    assert all((p == kind).all() for p in model.parameters()), "config and weights of different saves"
    return kind


def write_for_ever(folder: Path, kinds: list[int], shard: int) -> None:
    for model in cycle([model_of(kind) for kind in kinds]):
        weights.save(model, folder, max_shard_bytes=shard)


def start(folder: Path, kinds: list[int], shard: int, progress: int | None = None) -> int:
    """A process that never stops writing. Into the pipe `progress` it puts a byte whenever it is about to open,
    rename, make or remove something."""
    if (writer := os.fork()) == 0:
        try:
            if progress is not None:
                sys.addaudithook(lambda event, given: event in STEPS and os.write(progress, b"."))
            write_for_ever(folder, kinds, shard)
        finally:
            os._exit(1)
    return writer


def stop(writer: int) -> None:
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    assert os.WIFSIGNALED(status), "the writer failed before it was killed"


def kills(folder: Path, times: int, rng: random.Random) -> dict[int, int]:
    """How often which kind was there after the writer was killed at a random step."""
    seen = {1: 0, 2: 0}
    weights.save(model_of(1), folder)
    for _ in range(times):
        read, write = os.pipe()
        kinds, shard = rng.choice(([2, 1], [1, 2])), rng.choice((2_000, 10**9))
        writer = start(folder, kinds, shard, write)
        for _ in range(rng.randrange(STEPS_OF_TWO_SAVES)):  # by its progress: a busy machine changes nothing
            os.read(read, 1)
        stop(writer)
        os.close(read)
        os.close(write)
        seen[kind_of(folder)] += 1
    weights.save(model_of(1), folder)
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")], (
        "the next save cleans up"
    )
    return seen


def reads(folder: Path, times: int, writers: int) -> tuple[int, int]:
    """(whole reads, refusals because it is being written) beside as many writers, `times` in all."""
    weights.save(model_of(1), folder)
    running = [start(folder, [1, 2], [2_000, 10**9][i]) for i in range(writers)]
    whole = refused = 0
    try:
        for _ in range(times):
            try:
                kind_of(folder)
                whole += 1
            except ValueError as error:
                assert "is being written" in str(error), error
                refused += 1
    finally:
        for writer in running:
            stop(writer)
    kind_of(folder)
    return whole, refused


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--reads", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("killed; the folder held", kills(given.folder, given.kills, random.Random(given.seed)))
    for number in (1, 2):
        print(f"read beside {number} writers (whole, refused)", reads(given.folder, given.reads, number))
