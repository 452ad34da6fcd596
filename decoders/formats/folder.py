"""Where a checkpoint folder is, and its small files. Nothing heavy is imported."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from .switch import finish, stamp

T = TypeVar("T")

SMALL_FILES = ("*.json", "merges.txt", "*.model", "*.bpe", "*.jinja")  # configs, indexes, tokenizers
WEIGHT_FILES = (  # of a hub repository the first kind that it has is fetched
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    ("flax_model.msgpack",),
    ("tf_model.h5",),
)
REPLACED = (  # what of a folder makes a checkpoint, so that none of it may stay beside another
    *("*config.json", "*.index.json", "tokenizer.json", "vocab.json", "added_tokens.json"),
    *("special_tokens_map.json", "params_shapes.json", "merges.txt", "*.model", "*.bpe", "*.jinja"),
    *("*.safetensors", "*.gguf", "pytorch_model*.bin", "adapter_model.bin", "*.msgpack", "*.h5"),
)
MAX_BYTES = 2**28  # of a config or tokenizer file
PLAIN = [name for whole, *_ in WEIGHT_FILES for name in (whole, f"{whole}.index.json")]
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
ADAPTER = "adapter_config.json"
RELEASE = "latest_checkpointed_iteration.txt"  # in a folder as Adept released it


def checkpoint_files(folder: Path) -> set[str]:
    """Names of the files in a folder that belong to a checkpoint of whatever packaging."""
    return {file.name for pattern in REPLACED for file in folder.glob(pattern)}


def find(
    path_or_id: str | Path,
    weights: bool = True,
    subfolder: str = "",
    gguf_file: str | None = None,
    **hub: Any,
) -> Path:
    """The folder or `.gguf` file itself, or the folder of a hub id such as `EleutherAI/gpt-neo-125m`, fetched
    into the hub's cache; of either the `subfolder`. Of a folder with a GGUF model its (first) file, and
    where there are several the one called `gguf_file`. `hub` are options of
    `huggingface_hub.snapshot_download`.

    An existing folder makes no request; a save that was killed after its switch is finished there.
    FileNotFoundError where there is neither; ImportError if the hub is needed and `huggingface_hub` is not
    installed.
    """
    folder = Path(path_or_id) / subfolder
    if folder.is_dir():
        finish(folder)
        found = resolved(folder, gguf_file)
        if found.is_dir() and found.suffix == ".gguf":
            raise NotADirectoryError(f"{found} is a folder with the name of a GGUF file: rename it")
        return found
    if folder.is_file() and folder.suffix == ".gguf":  # which is a whole checkpoint by itself
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file: give the checkpoint's folder, or a .gguf file")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path_or_id)) or ".." in str(path_or_id):
        raise FileNotFoundError(f"there is no folder {folder}, and it cannot be a hub id")
    try:
        import huggingface_hub
    except ImportError:
        hint = "to fetch it from the hub: pip install '.[hub]'"
        raise ImportError(f"there is no folder {folder}; {hint}") from None

    def fetch(patterns: tuple[str, ...]) -> Path:
        wanted = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        snapshot = huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=wanted, **hub)
        return Path(snapshot) / subfolder

    try:
        if gguf_file is not None:
            return resolved(fetch((SHARD.sub(r"\1-*-of-\3.gguf", gguf_file),)), gguf_file)
        folder = fetch(SMALL_FILES)
        for patterns in WEIGHT_FILES if weights else ():
            folder = fetch(patterns)
            if any(any(folder.glob(pattern)) for pattern in patterns):
                break
        if weights and is_adapter(folder):
            folder = fetch(("adapter_model.safetensors", "adapter_model.bin"))
    except Exception as error:  # httpx's and the hub's own kinds; all mean that it cannot be had
        cause = f"the hub did not give it ({type(error).__name__}: {first_line(error)})"
        raise FileNotFoundError(f"there is no folder {path_or_id}, and {cause}") from error
    return folder


def resolved(folder: Path, gguf_file: str | None) -> Path:
    """The GGUF file of a folder that has one, or the folder."""
    if gguf_file is not None:
        return check_file(folder / gguf_file)
    files = gguf_files(folder)
    return files[0] if files else folder


def gguf_files(path: Path) -> list[Path]:
    """The GGUF file that `path` is or holds, or all its shards in order; [] if there is none. ValueError
    where the folder holds several models, or weights of another kind too; FileNotFoundError where a shard is
    missing."""
    if path.is_dir():
        files = sorted(file for file in path.glob("*.gguf") if file.is_file())
        models = {SHARD.sub(r"\1", file.name): file for file in reversed(files)}
        if len(models) > 1:
            names = ", ".join(file.name for file in sorted(models.values()))
            raise ValueError(f"{path} holds several GGUF models: give one of {names}")
        if files and (plain := [name for name in PLAIN if (path / name).exists()]):
            hint = "give the .gguf file itself, or move it into a folder of its own"
            raise ValueError(f"{path} holds two packagings, {plain[0]} and {files[0].name}: {hint}")
        return shards(files[0]) if files else []
    return shards(path) if path.suffix == ".gguf" else []


def shards(file: Path) -> list[Path]:
    """All files of the model that `file` is, or is a part of."""
    if not (name := SHARD.fullmatch(file.name)):
        return [file]
    stem, total = name[1], int(name[3])
    files = [file.with_name(f"{stem}-{i:05}-of-{total:05}.gguf") for i in range(1, total + 1)]
    if absent := [part.name for part in files if not part.exists()]:
        others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise FileNotFoundError(f"{file.parent} lacks {absent[0]}{others} of the model's {total} shards")
    return files


def is_adapter(folder: Path) -> bool:
    """Whether there is a LoRA in it, as peft saves one, alone or beside its base."""
    return (folder / ADAPTER).exists()


def adapter_base(folder: Path) -> Path:
    """The folder of the base that `adapter_config.json` names: a path, from here or from beside the adapter,
    or a hub id. ValueError or OSError where it is not to be had."""
    named = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(f"{folder / ADAPTER} names no base: load that, and give this as its adapter")
    inside = folder / named
    try:
        base = find(inside if inside.is_dir() and not Path(named).is_dir() else named)
    except (OSError, ImportError) as error:
        what = f"{folder / ADAPTER} names the base {named[:200]!r}, which is not to be had"
        raise FileNotFoundError(f"{what}: {first_line(error)}") from None
    if base.resolve() == folder.resolve() or (is_adapter(base) and not (base / "config.json").exists()):
        raise ValueError(f"{folder / ADAPTER} names as its base {named[:200]!r}, which is an adapter itself")
    return base


def read_settled(path_or_id: str | Path, read: Callable[[Path], T], weights: bool = True) -> tuple[Path, T]:
    """The folder, and what `read` makes of it, once more if somebody writes there meanwhile. ValueError if it
    is being written all the time."""
    for _ in range(2):
        folder = find(path_or_id, weights)
        before = stamp(folder)
        try:
            content = read(folder)
        except (OSError, ValueError):
            if stamp(folder) == before:
                raise
            continue
        if stamp(folder) == before:
            return folder, content
    raise ValueError(f"{folder} is being written: load it again when that has ended")


def check_file(path: Path) -> Path:
    """`path` itself, if it is a file with content. OSError or ValueError, in a sentence, if not."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    if not path.is_file():
        raise IsADirectoryError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            start = file.read(42)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise ValueError(f"{path} is empty")
    if start == b"version https://git-lfs.github.com/spec/v1":
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there")
    return path


def read_small(path: Path) -> bytes:
    """All of a config or tokenizer file. The largest real one has 20 MB: what is far larger, or has no end as
    some files in /proc, is refused before it fills the memory."""
    with check_file(path).open("rb") as file:
        content = file.read(MAX_BYTES + 1) if path.stat().st_size <= MAX_BYTES else None
    if content is None or len(content) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MB: it is no config and no vocabulary")
    return content


def read_text(path: Path) -> str:
    try:
        return read_small(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def read_json(path: Path, parse_float: Callable[[str], float] = float) -> dict:
    """The object in a JSON file. ValueError naming the file if it holds none; NaN is not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        content = json.loads(read_small(path).decode("utf-8"), parse_constant=refuse, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object of names and values")
    return content


def read_json_if_any(path: Path) -> dict:
    """As `read_json`, {} where there is no such file."""
    return read_json(path) if path.exists() else {}


def in_one_line(names: Iterable[str]) -> str:
    """Names of strangers, with commas between them: line breaks and escape codes are spelled out."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
