"""`kernels.c`, where the processor has the instructions and a C compiler is there.

    library = native.library()      # None where it is not to be had: PyTorch's own operators do it then
    native.status()                 # that in a sentence

Where it has not been compiled yet, that starts at the first need, in a process of its own (see `build.py`);
PyTorch's operators serve meanwhile. It comes into use with the beginning of a text (`begin_text`), never in
the middle of one. What it computes must be right in small cases before it is believed (`selftest.py`); a
plan is verified by each model's first step, and GGUF's rarer blocks by the tests. `DECODERS_NATIVE=0` does
without, `DECODERS_NATIVE=NAME` takes the instructions of that name in `build.TARGETS`. Its threads are
PyTorch's, `torch.get_num_threads()` of them.
"""

import atexit
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from . import build, calls
from .selftest import gives_the_right_numbers

TUNED = "-mtune=native"  # for this very processor, beside the instructions of a target
LOCK = threading.Lock()
THREAD = threading.local()  # .without: how many `without` blocks it is in


class State:
    """What has become of the library. `status` is None until the first need."""

    status: str | None = None
    library: calls.Library | None = None
    builder: subprocess.Popen | None = None
    path: Path
    target: build.Target


STATE = State()


def library() -> calls.Library | None:
    """The compiled functions; None where a compiler or an instruction is missing, a number is wrong, or it is
    still being compiled."""
    if STATE.status is None:
        with LOCK:
            if STATE.status is None:
                start()
    return None if getattr(THREAD, "without", 0) else STATE.library


def status() -> str:
    """Whether the compiled kernels are in use, and if not why."""
    begin_text()
    return str(STATE.status)


def is_available() -> bool:
    """Whether the compiled kernels are in use."""
    return library() is not None


def operators() -> str:
    """What computes, in two words."""
    return f"{STATE.target.name} kernels" if library() else "PyTorch's operators"


def is_pending() -> bool:
    """Whether they are being compiled."""
    return STATE.builder is not None


def begin_text() -> None:
    """Take the library into use, if it has been compiled meanwhile."""
    library()
    if STATE.builder is not None and STATE.builder.poll() is not None:
        with LOCK:
            if STATE.builder is not None:
                STATE.builder = None
                settle(build.load(STATE.path), "kernels.c does not compile here")


def wait(seconds: float | None = None) -> bool:
    """Wait for the compiler, at most so long (None: till it ends). Whether the kernels are in use then."""
    library()
    if (builder := STATE.builder) is not None:
        with suppress(subprocess.TimeoutExpired):
            builder.wait(seconds)
    begin_text()
    return is_available()


@contextmanager
def without() -> Iterator[None]:
    """PyTorch's operators within, in this thread: for a text that began with them."""
    THREAD.without = getattr(THREAD, "without", 0) + 1
    try:
        yield
    finally:
        THREAD.without -= 1


def dequantize_blocks(blocks: Tensor, kind: str, numbers: Tensor) -> bool:
    """Fill `numbers`, contiguous, with what GGUF's blocks (n, bytes) of this type stand for. False where that
    is not done here: no library, another dtype or type."""
    fits = blocks.is_contiguous() and numbers.dtype in (torch.float32, torch.bfloat16, torch.float16)
    lib = library() if fits and kind in calls.BLOCKS and numbers.is_cpu else None
    if lib is None:
        return False
    calls.dequantize_blocks(lib, blocks, kind, numbers)
    return True


def whole_numbers(blocks: Tensor, kind: str, q: Tensor) -> bool:
    """Fill q (n, 32 or 16) uint8, contiguous, with the numbers of GGUF's blocks (n, bytes) of Q8_0; or of
    Q4_0 and Q4_1 in pairs, number 2 i in the lower half of byte i. False where that is not done here."""
    lib = library() if blocks.is_contiguous() and kind in ("Q8_0", "Q4_0", "Q4_1") else None
    if lib is None:
        return False
    calls.whole_numbers(lib, blocks, kind, q)
    return True


# ---- Found, or started -------------------------------------------------------------------------------------


def start() -> None:
    """Load the library, or start the process that compiles it."""
    processor = processor_flags()
    target, problem = target_for(processor)
    if target is None:
        settle(None, problem)
        return
    STATE.target = target
    try:
        prepare_threads()
        if lib := build.load_packaged(target):
            settle(lib, "")
            return
        compiler = next(filter(None, map(shutil.which, ("gcc", "cc"))), None)
        if compiler is None:
            settle(None, "there is no C compiler")
            return
        flags = [*target.flags, TUNED]
        STATE.path = build.library_path(build_folder(), compiler, flags, processor)
        if lib := build.load(STATE.path):
            settle(lib, "")
            return
        STATE.builder = build.start(compiler, STATE.path, flags)
        STATE.status = "being compiled"
        say("compiling the CPU kernels, once and in the background; PyTorch's operators serve meanwhile")
    except OSError as error:
        settle(None, str(error))


def target_for(processor: set[str]) -> tuple[build.Target | None, str]:
    """The best instructions that this processor has, or those that DECODERS_NATIVE names; else why none."""
    asked, known = os.environ.get("DECODERS_NATIVE", ""), build.targets_here()
    if asked == "0":
        return None, "DECODERS_NATIVE=0"
    if asked not in ("", "1"):
        known = [target for target in known if target.name == asked]
        if not known:
            return None, f"DECODERS_NATIVE={asked} names no instructions of this machine"
    problem = f"there are none for {platform.system()} on {platform.machine()}"
    for target in known:
        lacking = target.needed - processor
        if not lacking:
            return target, ""
        problem = f"the processor has no {min(lacking)}"
    return None, problem


def settle(lib: calls.Library | None, problem: str) -> None:
    """Believe the library, or do without it for good."""
    if lib is not None:
        try:
            right = gives_the_right_numbers(calls.declare(lib))
            problem = "kernels.c gives wrong numbers"
        except AttributeError:
            right, problem = False, "the library lacks a function"
        lib = lib if right else None
    STATE.library = lib
    STATE.status = f"in use, for {STATE.target.name}" if lib else f"not in use: {problem}"


def build_folder() -> Path:
    """The cache folder; without one a folder for this process alone."""
    folder = build.cache_folder()
    if folder is None:
        say("the cache folder is missing, or others can write to it: compiling for this process alone")
        folder = Path(tempfile.mkdtemp(prefix="decoders-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def say(message: str) -> None:
    """On standard error, where a person sees it."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"decoders: {message}", file=sys.stderr)


def prepare_threads() -> None:
    """PyTorch's threads, not a second pool of them. OSError where it has others than libgomp's."""
    folder = Path(torch.__file__).parent / "lib"
    runtime = sorted(folder.glob("libgomp*.so*"))
    if not runtime:
        raise OSError(f"this PyTorch has no libgomp in {folder}")
    ctypes.CDLL(str(runtime[0]), mode=ctypes.RTLD_GLOBAL)


def processor_flags() -> set[str]:
    """The instructions that this processor has, as Linux calls them."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):  # of x86, of Arm
                return set(line.partition(":")[2].split())
    return set()
