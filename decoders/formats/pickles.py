"""What a PyTorch file asks for: its pickles' instructions are read, none is run."""

import mmap
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 2**28  # of an archive's pickle: names and shapes, without the numbers
TENSORS = re.compile(
    r"collections OrderedDict|torch(\.storage)? \w+Storage|torch (Size|device|[a-z_]*\d+\w*|bool)"
    r"|torch\._utils (_rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state))"
)


def foreign(file: Path) -> set[str]:
    """What its first pickle that does so asks for beside plain tensors, as "module.name": not only code, also
    `bytearray`, which takes any amount of memory. Damage raises what pickletools and zipfile make of it."""
    for pickle in pickles(file):
        asked = {
            str(argument)
            for operation, argument, _ in pickletools.genops(pickle)
            if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL")
        }
        if others := {name.replace(" ", ".") for name in asked if not TENSORS.fullmatch(name)}:
            return others
    return set()


def pickles(file: Path) -> Iterator[Any]:
    """The pickle of an archive, or the five with which files before PyTorch 1.6 begin, for genops to read."""
    with file.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(raw) as archive:
                for entry in archive.infolist():
                    if entry.filename.endswith("/data.pkl"):
                        if entry.file_size > MAX_BYTES:
                            raise ValueError(f"its names and shapes alone are {entry.file_size} bytes")
                        yield archive.read(entry)
        else:  # a mapping gives no more than there is, whatever length an instruction names
            yield from [content] * 5
