"""`kernels.c` is compiled once for each processor, compiler and version of the source, and kept in the user's
cache folder: `~/.cache/decoders`, or below `XDG_CACHE_HOME`."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

SOURCE = Path(__file__).parent / "kernels.c"


def compiled(compiler: str, flags: set[str]) -> ctypes.CDLL:
    """The library, out of the cache or made now. Another process may make the same: the last one to rename
    its file wins, and all are alike. Where no cache can be written it is made for this process alone."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    ingredients = SOURCE.read_bytes() + version + " ".join(sorted(flags)).encode()
    name = f"kernels-{hashlib.sha256(ingredients).hexdigest()[:16]}.so"
    folder = cache_folder()
    if folder and (folder / name).exists():
        return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        steps = (
            ["-O3", "-march=native", "-fopenmp", "-fPIC", "-c", str(SOURCE), "-o", "k.o"],
            ["-shared", "k.o", "-o", "k.so"],  # not linked to another runtime of OpenMP
        )
        for step in steps:
            subprocess.run([compiler, *step], cwd=place, capture_output=True, check=True, timeout=300)
        lib = ctypes.CDLL(str(Path(place) / "k.so"))  # which needs its file no longer
        if folder:
            os.replace(Path(place) / "k.so", folder / name)
        return lib


def cache_folder() -> Path | None:
    """Where libraries are kept; None where there is no such folder of this user alone."""
    with suppress(OSError, RuntimeError):  # a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decoders"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    return None
