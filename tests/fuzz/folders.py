"""Put any JSON into any field of a folder's small files: python -m tests.fuzz.folders --minutes 60 --seed 3

Each folder is loaded and asked for two tokens: an answer, or one ValueError or OSError that names the file. What
else comes out is shrunk to the one field that does it and printed as a test.
"""

import json
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from decoders import model_class, read_config, tokenize, weights
from tests.fuzz.budget import arguments, numbers

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json",
         "added_tokens.json", "preprocessor_config.json", "vocab.json")  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, 10**30, 10**400, 2**31, 2**63, "", "x", "torch", "nn", "float16", "\x1b[31m",
    [], [1], ["torch"], [[1, 2], [3]], [None], {}, {"content": [1]}, {"content": "x"}, {"a": {"b": []}}, "1" * 401, [0.5] * 3,
)  # fmt: skip


CPU_SECONDS = 20


def fields(content: object, path: tuple = ()) -> Iterator[tuple]:
    """Where something could be put: names and numbers that lead there."""
    if isinstance(content, dict):
        for key in list(content)[:60]:
            yield (*path, key)
            yield from fields(content[key], (*path, key)) if len(path) < 3 else ()
    elif isinstance(content, list):
        for i in range(min(2, len(content))):
            yield (*path, i)
            yield from fields(content[i], (*path, i)) if len(path) < 3 else ()


def put(content: object, path: tuple, value: object) -> object:
    changed = json.loads(json.dumps(content))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def damaged(base: Path, name: str, file: str, path: tuple, value: object) -> Path:
    """The checkpoint `name` with one value put elsewhere, its other files linked."""
    folder = base / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(CHECKPOINTS / name, folder, copy_function=link)
    content = put(json.loads((folder / file).read_text()), path, value)
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(content))
    return folder


def use(folder: Path) -> None:
    """What a user does: encode, load, generate, decode."""
    tokenizer = tokenize.load(folder)
    ids = torch.tensor([tokenizer.encode("Once upon a time")])
    model = weights.load(model_class(read_config(folder)), folder)
    rows = getattr(model.config, "text_config", model.config).vocab_size
    if hasattr(model, "generate") and int(ids.max()) < rows:  # else the command line says so
        tokenizer.decode(model.generate(ids, max_new_tokens=2)[0].tolist())


def outcome(folder: Path) -> str:
    """'answered', 'refused', or what went wrong."""
    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # of this process: a busy machine does not count
    signal.alarm(30 * CPU_SECONDS)  # for what waits
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(folder)
    except (ValueError, OSError) as error:
        text = str(error)
        if "\n" in text.strip() or len(text) > 4000:
            return f"a message of {len(text)} characters in {text.count(chr(10)) + 1} lines: {text[:80]!r}"
        if "\x1b" in text:
            return f"escape codes in {text!r}"
        return "refused" if str(folder) in text else f"without the file's name: {text[:160]!r}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a Rust library panics with one
        return f"{type(error).__name__}: {str(error)[:160]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return "answered"


def late(*given) -> None:
    raise RuntimeError(f"no answer after {CPU_SECONDS} seconds of computing")


def drawn_cases(rng: random.Random) -> Iterator[tuple[str, str, tuple, object]]:
    """(checkpoint, file, path, value) for ever; names that are not there are among the paths."""
    extra = [("architectures",), ("model_type",), ("text_config",), ("rope_scaling",), ("rope_theta",), ("rope_parameters",),
             ("bos_token",), ("add_eos_token",), ("chat_template",), ("id2label",), ("num_labels",), ("eos_token_id",)]  # fmt: skip
    names = sorted(folder.name for folder in CHECKPOINTS.glob("tiny-*"))
    while True:
        name = rng.choice(names)
        file = rng.choice([file for file in FILES if (CHECKPOINTS / name / file).exists()])
        content = json.loads((CHECKPOINTS / name / file).read_text())
        paths = [*fields(content), *(extra if file in ("config.json", "tokenizer_config.json") else ())]
        if paths:
            yield name, file, rng.choice(paths), rng.choice(VALUES)


def run(
    seed: int, cases: int | None = None, seconds: float | None = None
) -> tuple[dict[str, int], list[str]]:
    """How often what came out, and a test for each failure."""
    counts, failures, seen = {"answered": 0, "refused": 0, "failed": 0}, [], set()
    drawn = drawn_cases(random.Random(seed))
    with tempfile.TemporaryDirectory() as base:
        for _ in numbers(cases, seconds):
            name, file, path, value = next(drawn)
            found = outcome(damaged(Path(base), name, file, path, value))
            counts[found if found in counts else "failed"] += 1
            if found not in counts and (file, found[:40]) not in seen:
                seen.add((file, found[:40]))
                failures.append(
                    f"    ({name!r}, {file!r}, {path!r}, {value if value != 10**400 else '10**400'!r}),  # {found}"
                )
    return counts, failures


def link(source: str, target: str) -> None:
    Path(target).symlink_to(Path(source).resolve())


if __name__ == "__main__":
    given = arguments(__doc__)
    torch.set_num_threads(1)
    totals, tests = run(given.seed, given.cases, given.seconds)
    print(totals, *tests, sep="\n")
    sys.exit(bool(tests))
