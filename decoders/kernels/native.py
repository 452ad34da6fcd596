"""`kernels.c`, where the processor has the instructions and a C compiler is there.

    library = native.library()      # None where it is not to be had: PyTorch's own operators do it then

It is compiled at the first need, into the user's cache folder (see `build.py`). Every function must give the
right numbers before it is believed. `DECODERS_NATIVE=0` does without. Its threads are PyTorch's,
`torch.get_num_threads()` of them.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from . import build, calls
from .selftest import gives_the_right_numbers

NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}


@cache
def library() -> calls.Library | None:
    """The compiled functions; None where a compiler or an instruction is missing, or a number is wrong."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc"))), None)
    flags = processor_flags()
    if os.environ.get("DECODERS_NATIVE") == "0" or not compiler or not flags >= NEEDED:
        return None
    runtime = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    try:
        ctypes.CDLL(str(runtime[0]), mode=ctypes.RTLD_GLOBAL)  # PyTorch's threads, not a second pool of them
        lib = calls.declare(build.compiled(compiler, flags))
    except (OSError, IndexError, AttributeError, subprocess.SubprocessError):
        return None
    return lib if gives_the_right_numbers(lib) else None


def is_available() -> bool:
    """Whether the compiled kernels are in use."""
    return library() is not None


def processor_flags() -> set[str]:
    """The instructions that this processor has, as Linux calls them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()
