"""Damage the bytes of a folder's files, or swap them: python -m tests.fuzz.damage --minutes 60 --seed 3

Weights in every layout, vocabularies, configs, and the names and shapes inside a PyTorch archive. Each folder is loaded and
asked for two tokens: an answer, or one ValueError or OSError that names the file. What else comes out is shrunk to the
fewest edits that do it and printed as a test.
"""

import functools
import io
import json
import random
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from decoders import model_class, read_config, tokenize, weights
from decoders.cli import convert
from tests import folders as layouts
from tests import packers
from tests.fuzz.budget import arguments, numbers
from tests.fuzz.folders import CHECKPOINTS, link, outcome

NAMES = ("tiny-gpt-neo", "tiny-openai-gpt", "tiny-phi", "tiny-phi3", "tiny-persimmon", "tiny-fuyu")
LAYOUTS: dict[str, Callable | None] = {
    "safetensors": None, "safetensors in shards": layouts.safetensors_shards, "pickle": layouts.pickle_whole,
    "old pickle": layouts.pickle_old, "pickle in shards": layouts.pickle_shards,
}  # fmt: skip
GGUF = {"GGUF": "F16", "GGUF of 4 bits": "Q4_0"}  # of the families that have one
PACKED = {  # as `packers.py` calls them -> the checkpoint that is packed so
    "gptq-4bits": "tiny-phi3", "gptq-3bits": "tiny-phi", "gptq-actorder": "tiny-gpt-neo", "awq": "tiny-phi3",
    "bnb-nf4dq": "tiny-openai-gpt", "bnb-fp4": "tiny-fuyu", "bnb-int8": "tiny-persimmon", "mlx-4bits": "tiny-phi3",
    "mlx-mxfp4": "tiny-phi", "ct-int4-asymmetric": "tiny-phi3", "ct-fp8-block": "tiny-phi", "fp8": "tiny-phi",
    "torchao-int4": "tiny-gpt-neo", "hqq-3bits-axis1": "tiny-phi3", "adapter": "tiny-phi",
}  # fmt: skip
KEYS = re.compile(
    rb"(general|tokenizer|phi[23])\.|blk\.|output|token_embd"
)  # where a GGUF header's fields begin
QUANTIZED = ("int8", "int4")
Edit = tuple[str, int, int, bytes]  # file, from where, how many bytes go, what comes


@functools.cache
def base_folder() -> tempfile.TemporaryDirectory:
    """Of all sound checkpoints; gone with this process."""
    return tempfile.TemporaryDirectory(prefix="decoders-fuzz-")


@functools.cache
def prepared(name: str, layout: str) -> Path:
    """The checkpoint in that layout."""
    folder = Path(base_folder().name) / f"{name}-{layout.replace(' ', '-')}"
    if layout in GGUF:
        folder.mkdir()
        convert.to_gguf(CHECKPOINTS / name, folder / "model.gguf", GGUF[layout], None)
        return folder
    if layout in QUANTIZED:
        model = weights.load(
            model_class(read_config(CHECKPOINTS / name)), CHECKPOINTS / name, quantize=layout
        )
        weights.save(model, folder, tokenize.load(CHECKPOINTS / name))
        return folder
    if layout in PACKED:
        return packed(CHECKPOINTS / name, folder, layout)
    shutil.copytree(
        CHECKPOINTS / name, folder, ignore=shutil.ignore_patterns("*.safetensors" if LAYOUTS[layout] else "")
    )
    if write := LAYOUTS[layout]:
        config = read_config(folder)
        write(
            folder,
            {
                k: v.clone()
                for k, v in weights.load(model_class(config), CHECKPOINTS / name).state_dict().items()
            },
        )
    return folder


def packed(source: Path, folder: Path, kind: str) -> Path:
    """The checkpoint in a packaging, its bits drawn; or with a LoRA beside it."""
    weightless = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(source, folder, ignore=None if kind == "adapter" else weightless)
    if kind == "adapter":
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        width = read_config(source)["hidden_size"]
        tensors = {"lora_A.weight": torch.ones(4, width), "lora_B.weight": torch.ones(width, 4)}
        save_file(
            {f"{module}.{part}": t for part, t in tensors.items()}, folder / "adapter_model.safetensors"
        )
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"k_proj": 2}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder
    config = read_config(source)
    packers.write_model(folder, kind, weights.load(model_class(config), source), config)
    return folder


def content_of(folder: Path, file: str) -> bytes:
    """Of `archive!/entry` the entry."""
    path, _, entry = file.partition("!/")
    if entry:
        with zipfile.ZipFile(folder / path) as archive:
            return archive.read(entry)
    return (folder / path).read_bytes()


def damaged(base: Path, name: str, layout: str, edits: list[Edit]) -> Path:
    folder, sound = base / "folder", prepared(name, layout)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder, copy_function=link)
    changed: dict[str, bytes] = {}
    for file, start, gone, new in edits:
        content = changed.get(file) or content_of(sound, file)
        changed[file] = content[:start] + new + content[start + gone :]
    for file, content in changed.items():
        path, _, entry = file.partition("!/")
        if entry:
            whole = io.BytesIO()
            with zipfile.ZipFile(sound / path) as old, zipfile.ZipFile(whole, "w") as archive:
                for info in old.infolist():
                    archive.writestr(info.filename, content if info.filename == entry else old.read(info))
            content = whole.getvalue()
        (folder / path).unlink()
        (folder / path).write_bytes(content)
    return folder


def edits_of(rng: random.Random, folder: Path) -> list[Edit]:
    files = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".txt", ".gguf")
    )
    files = [file for file in files if file not in ("training.json", "training.png")]
    file = rng.choice(files)
    if file.endswith(".bin") and zipfile.is_zipfile(folder / file) and rng.random() < 0.7:
        with zipfile.ZipFile(folder / file) as archive:
            file = f"{file}!/{next(entry for entry in archive.namelist() if entry.endswith('data.pkl'))}"
    content = content_of(folder, file)
    size = len(content)
    if rng.random() < 0.1:  # swapped for another
        return [(file, 0, size, content_of(folder, rng.choice(files)))]
    if rng.random() < 0.15:  # cut
        return [(file, rng.randrange(size), size, b"")]
    edits = []
    near = rng.choice((8, 64, 2000, size))  # headers are where it matters
    places = [0, *(key.start() for key in KEYS.finditer(content))] if file.endswith(".gguf") else [0]
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.choice(places)
        start = place + rng.randrange(min(near, size - place))
        new = rng.choice(
            (
                rng.randbytes(1),
                b"\x00",
                b"\xff" * 8,
                rng.randbytes(rng.randint(0, 9)),
                bytes([content[start] ^ 1 << rng.randrange(8)]),
            )
        )
        edits.append((file, start, rng.choice((1, 1, 0, len(new))), new))
    return edits


def drawn_cases(rng: random.Random) -> Iterator[tuple[str, str, list[Edit]]]:
    while True:
        name, layout = rng.choice(NAMES), rng.choice([*LAYOUTS, *QUANTIZED, *GGUF, *PACKED])
        name = PACKED.get(layout, name)
        if layout in GGUF:
            name = rng.choice(("tiny-phi", "tiny-phi3"))
        yield name, layout, edits_of(rng, prepared(name, layout))


def run(
    seed: int, cases: int | None = None, seconds: float | None = None
) -> tuple[dict[str, int], list[str]]:
    """How often what came out, and a test for each failure."""
    counts, failures, seen = {"answered": 0, "refused": 0, "failed": 0}, [], set()
    drawn = drawn_cases(random.Random(seed))
    with tempfile.TemporaryDirectory() as base:
        for _ in numbers(cases, seconds):
            name, layout, edits = next(drawn)
            found = outcome(damaged(Path(base), name, layout, edits))
            counts[found if found in counts else "failed"] += 1
            if found not in counts and found[:40] not in seen:
                seen.add(found[:40])
                for edit in list(edits):
                    fewer = [other for other in edits if other != edit]
                    if fewer and outcome(damaged(Path(base), name, layout, fewer)) == found:
                        edits = fewer
                failures.append(f"    ({name!r}, {layout!r}, {edits!r}),  # {found}")
    return counts, failures


if __name__ == "__main__":
    given = arguments(__doc__)
    torch.set_num_threads(1)
    totals, tests = run(given.seed, given.cases, given.seconds)
    print(totals, *tests, sep="\n")
    sys.exit(bool(tests))
