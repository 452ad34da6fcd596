"""ONNX and OpenVINO: programs, not checkpoints. They are recognised to be refused with the way out.

An exporter renames most matrices, and folds some of them: which is which cannot be told by name.
"""

from pathlib import Path

from .files import FORMATS
from .parts import Stored

NAME = "ONNX or OpenVINO"


def exported(folder: Path) -> list[Path]:
    """The programs in a folder, or in the subfolder where the hub's repositories have them."""
    if not folder.is_dir():
        return []
    patterns = ("*.onnx", "onnx/*.onnx", "openvino*.xml", "openvino*.bin")
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def recognise(folder: Path, config: dict) -> bool:
    """Where nothing else is there: many repositories have both."""
    if any((folder / name).exists() or (folder / f"{name}.index.json").exists() for name in FORMATS):
        return False
    return bool(exported(folder)) and not any(folder.glob("*.gguf"))


def tensors(folder: Path, config: dict) -> Stored:
    file = exported(folder)[0]
    kind = "ONNX" if file.suffix == ".onnx" else "OpenVINO"
    why = f"an {kind} program, whose weights have lost their names"
    raise ValueError(f"{file} is {why}: get the safetensors that it was exported from")
    yield  # a generator, as those of the other packagings
