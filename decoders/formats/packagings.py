"""Which packaging a checkpoint is in -> its tensors, dequantised when they are used.

A packaging is a module of this room with

    NAME                          what people call it: "GGUF", "GPTQ"
    recognise(folder, config)     whether the folder (or a single `.gguf` file) is in it, by names and small
                                  files only. `config` is what `read_config` says, {} where that is not known
    tensors(folder, config)       (file, name, tensor) of all that it holds: a plain `Tensor` or a `Packed`,
                                  under a name that a plain checkpoint, of any era, has for it

and a line in `PACKAGINGS`. What none of them recognises is plain: `files.py` reads it. A packaging that is
known and not supported is recognised too, and its `tensors` raises the sentence that says what to do.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from . import (
    bitsandbytes,
    compressed_tensors,
    exported,
    files,
    gguf_tensors,
    gptq,
    hqq,
    mlx,
    torchao,
)
from .checks import check_quantized
from .packed import Packed


class Packaging(Protocol):
    """What a module of this room offers to be one."""

    NAME: str

    def recognise(self, folder: Path, config: dict) -> bool: ...

    def tensors(self, folder: Path, config: dict) -> Iterator[tuple[Path, str, Tensor | Packed]]: ...


PACKAGINGS: tuple[Packaging, ...] = (
    gguf_tensors,
    bitsandbytes,
    gptq,
    mlx,
    compressed_tensors,
    torchao,
    hqq,
    exported,
)


def packaging(folder: Path, config: dict) -> Packaging | None:
    """The one that the folder is in; None if it is plain. ValueError if it is in two at once, or in one that
    is not known."""
    found = [module for module in PACKAGINGS if module.recognise(folder, config)]
    if len(found) > 1:
        names = " and ".join(module.NAME for module in found)
        raise ValueError(f"{folder} is in two packagings at once, {names}: keep the files of one")
    if not found:
        try:
            check_quantized(config)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
    return found[0] if found else None


def packaging_name(folder: Path, config: dict) -> str:
    """For people: "GPTQ"; "adapter" where the weights are plain, and a LoRA is all that changes them."""
    module = packaging(folder, config)
    if module is None:
        return "adapter"
    stated = config.get("quantization_config") or config.get("compression_config")
    method = str(stated.get("quant_method", "")) if isinstance(stated, dict) else ""
    if method in ("gptq", "awq"):
        return method.upper()
    is_shared = " or " in module.NAME  # by methods whose folders look alike
    return method if is_shared and method else module.NAME


def stored_tensors(folder: Path, config: dict) -> Iterator[tuple[Path, str, Tensor | Packed]]:
    """(file, name, tensor) of everything that a checkpoint of any packaging holds."""
    module = packaging(folder, config)
    yield from module.tensors(folder, config) if module else files.stored_tensors(folder)
