"""decoders convert: a checkpoint of any packaging as a plain one of today, or as a GGUF file."""

import argparse
from pathlib import Path
from typing import Any

import torch

from decoders import find, formats, model_class, read_config, tokenize, weights

from .output import check_new, human_bytes, print_note

OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SHARD = 2_000_000_000  # bytes of a safetensors file, which is what memory must hold


def run(args: argparse.Namespace) -> int:
    source, output = find(args.model), Path(args.output)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    is_gguf = output.suffix == ".gguf"
    if args.packaging == "safetensors" and is_gguf:
        raise ValueError(f"{output}: a plain checkpoint is a folder, whose name does not end in .gguf")
    if args.packaging == "gguf" or is_gguf:
        file = output if is_gguf else output / f"{name_of(source)}.gguf"
        check_output(source, file, args.force)
        to_gguf(source, file, args.type, dtype)
        print_note(f"{file}: {human_bytes(file.stat().st_size)}")
        return 0
    if args.type is not None:
        raise ValueError("--type is for --packaging gguf: plain tensors have a --dtype")
    check_output(source, output, args.force)
    to_plain(source, output, dtype, args.force)
    print_note(f"{output} holds the plain checkpoint")
    return 0


def name_of(source: Path) -> str:
    """Of the folder, which may have a dot in its name (phi-1.5); of a file without .gguf."""
    return source.resolve().name.removesuffix(".gguf")


def check_output(source: Path, output: Path, force: bool) -> None:
    """ValueError or FileExistsError, before anything is read, where something would be lost. A folder that
    got a GGUF file beside its own would not load any more."""
    own, place = source.resolve(), output.resolve()
    is_inside = place.suffix == ".gguf" and place.parent == own
    if place in (own, own.parent) or is_inside:
        raise ValueError(
            f"{output.parent if is_inside else output} holds the checkpoint itself: give another OUT"
        )
    check_new(output, force)
    if force and output.exists() and output.suffix != ".gguf":
        check_replaced(output)


def check_replaced(folder: Path) -> None:
    """NotADirectoryError for a file, FileExistsError for a folder of other things than a checkpoint."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: give a folder, or a name that ends in .gguf")
    if any(folder.iterdir()) and not formats.checkpoint_files(folder):
        raise FileExistsError(f"{folder} holds no checkpoint that could be replaced: give another OUT")


def read_checkpoint(source: Path) -> tuple[Any, weights.Tensors]:
    """The model, without its weights, and these. ValueError where some are missing."""
    cls = model_class(read_config(source))
    model, tensors = weights.fitting(cls, source)
    if problems := weights.match(model, tensors).problems:
        raise ValueError(f"{source} does not fit {cls.__name__}: {'; '.join(problems)}")
    return model, tensors


def to_plain(source: Path, folder: Path, dtype: torch.dtype | None, force: bool) -> None:
    """All tensors under the hub's names, dequantised a shard at a time, with config and tokenizer. `force`:
    in place of the checkpoint that `folder` holds."""
    model, tensors = read_checkpoint(source)
    state = dict(tensors.stored)
    if dtype is not None:
        state = {name: formats.as_dtype(tensor, dtype) for name, tensor in state.items()}
    try:
        tokenizer = tokenize.load(source)
    except FileNotFoundError:
        tokenizer = None
        print_note(f"note: {source} holds no tokenizer, so {folder} gets none")
    stored = weights.stored_dtype(source, state.values())
    weights.write_checkpoint(model, stored, state, folder, tokenizer, SHARD, is_another=force)


def to_gguf(source: Path, file: Path, kind: str | None, dtype: torch.dtype | None) -> None:
    """The GGUF file, as a whole or not at all."""
    model, tensors = read_checkpoint(source)
    if kind is None:
        kind = OF_DTYPE[dtype or weights.stored_dtype(source, tensors.stored.values())]
    shapes = {name: tensor.shape for name, tensor in tensors.stored.items()}
    config = {"model_type": model.config.model_type, **model.config.to_dict()}
    try:
        metadata = formats.gguf_metadata(config, **vocabulary(source), name=name_of(source), kind=kind)
        entries = formats.gguf_entries(config, shapes, kind, tensors.__getitem__)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    with formats.without_remains(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        formats.write_file(file, lambda out: formats.write_gguf(out, metadata, entries))


def vocabulary(source: Path) -> dict[str, Any]:
    """What `gguf_metadata` wants to know of the tokenizer."""
    tokenizer = tokenize.load(source)
    if source.suffix == ".gguf":
        files, (settings, _) = formats.gguf_vocabulary(source), formats.gguf_tokenizer_config(source)
    else:
        files = formats.read_files(source)
        settings = formats.read_json_if_any(source / "tokenizer_config.json")
    roles = {"bos": "bos", "eos": "eos", "padding": "pad"}
    return {
        "files": files,
        "added": tokenizer.added.values(),
        "ids": {theirs: getattr(tokenizer, f"{ours}_token_id") for theirs, ours in roles.items()},
        "add_bos_token": bool(tokenizer.prefix_ids),
        "template": formats.chat_template(source, settings),
    }
