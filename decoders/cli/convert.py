"""decoders convert: a checkpoint of any packaging as a plain one of today, or as a GGUF file."""

import argparse
from pathlib import Path
from typing import Any

import torch

from decoders import find, formats, model_class, read_config, tokenize, weights

from .output import human_bytes, print_note

OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SHARD = 2_000_000_000  # bytes of a safetensors file, which is what memory must hold


def run(args: argparse.Namespace) -> int:
    source = find(args.model)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.packaging == "gguf":
        file = to_gguf(source, Path(args.output), args.type, dtype)
        print_note(f"{file}: {human_bytes(file.stat().st_size)}")
        return 0
    if args.type is not None:
        raise ValueError("--type is for --packaging gguf: plain tensors have a --dtype")
    to_plain(source, Path(args.output), dtype)
    print_note(f"{args.output} holds the plain checkpoint")
    return 0


def whole(source: Path) -> tuple[Any, weights.Tensors]:
    """The model, without its weights, and these. ValueError where some are missing."""
    cls = model_class(read_config(source))
    model, found = weights.fitting(cls, source)
    if problems := weights.match(model, found).problems:
        raise ValueError(f"{source} does not fit {cls.__name__}: {'; '.join(problems)}")
    return model, found


def to_plain(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """All tensors under the hub's names, dequantised a shard at a time, with config and tokenizer."""
    if folder.resolve() in (source.resolve(), source.resolve().parent):
        raise ValueError(f"{folder} holds the checkpoint itself: give another folder")
    model, found = whole(source)
    state = dict(found.stored)
    if dtype is not None:
        state = {name: formats.as_dtype(tensor, dtype) for name, tensor in state.items()}
    try:
        tokenizer = tokenize.load(source)
    except FileNotFoundError:
        tokenizer = None
        print_note(f"note: {source} holds no tokenizer, so {folder} gets none")
    stored = weights.stored_dtype(source, state.values())
    weights.write_checkpoint(model, stored, state, folder, tokenizer, SHARD)


def to_gguf(source: Path, output: Path, kind: str | None, dtype: torch.dtype | None) -> Path:
    """The GGUF file; `output` is it, or the folder for it."""
    file = output if output.suffix == ".gguf" else output / f"{source.resolve().stem}.gguf"
    model, found = whole(source)
    if kind is None:
        kind = OF_DTYPE[dtype or weights.stored_dtype(source, found.stored.values())]
    shapes = {name: tensor.shape for name, tensor in found.stored.items()}
    config = {"model_type": model.config.model_type, **model.config.to_dict()}
    try:
        metadata = formats.gguf_metadata(config, **vocabulary(source), name=source.resolve().stem, kind=kind)
        entries = formats.gguf_entries(config, shapes, kind, found.__getitem__)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    formats.write_file(file, lambda out: formats.write_gguf(out, metadata, entries))
    return file


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
