"""The folder that keeps the compiled kernels, damaged at random.

What `decoders.kernels` decides is asked in this process, of a small library that stands for the large one: it
gives the right numbers, or it is not in use and a sentence says why. Then what compiles is run over the same
folder, and the library must be right afterwards wherever the folder lets it be. Now and then a fresh process
answers a text from such a folder. A library that is loaded without a check ends this process: that is loud enough.
"""

import _ctypes
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from decoders.kernels import build, native
from tests.fuzz.uses import ROOT, Failed, expected

NAME = "kernels-0123456789abcdef.so"


@functools.cache
def image(source: str = "int seven(void) { return 7; }\n") -> bytes:
    """A library that compiles in no time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.c"
        file.write_text(source)
        return build.compiled(str(shutil.which("gcc") or shutil.which("cc")), file, [])


def checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


# ---- Damage --------------------------------------------------------------------------------------------------


def put(path: Path, content: bytes) -> None:
    """As `build` leaves a file, in the place of whatever is there."""
    remove(path)
    path.write_bytes(content)
    path.chmod(0o600)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Cut short, zeros at the end, a few bytes changed, something else."""
    way, n = rng.randrange(5), rng.randrange(len(content)) if content else 0
    if way == 0 or not content:
        return content[:n]
    if way == 1:
        return content[:n] + bytes(len(content) - n)
    if way == 2:
        return content + rng.choice((b"\n", b"\0", content))
    if way == 3:
        return rng.choice((b"", b"\xff\xfe", b"x" * 64, content.upper(), content[::-1]))
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 20))):
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
    return bytes(changed)


def damage(rng: random.Random, folder: Path, library: Path) -> None:
    """One thing that has happened to the folder."""
    both = (library, build.checksum_path(library))
    leftovers = [path.with_name(f".{path.name}.new") for path in both]
    path = rng.choice(both)
    way = rng.randrange(9)
    if way <= 1 and path.is_file():
        put(path, damaged(rng, path.read_bytes()))
    elif way == 2:
        remove(path)
    elif way == 3:  # what a killed process has left
        put(rng.choice(leftovers), damaged(rng, image()))
    elif way == 4 and path.is_file():
        path.chmod(rng.choice((0o000, 0o400, 0o602, 0o620, 0o666, 0o777)))
    elif way == 5:
        folder.chmod(rng.choice((0o700, 0o755, 0o770, 0o702, 0o777)))
    elif way in (6, 7):
        instead_of_a_file(rng, rng.choice((*both, *leftovers)), folder)
    elif way == 8:  # whole, and no library, or that of another source
        other = rng.choice((b"no library", b"", image("int eight(void) { return 8; }\n"), image("int seven(void) { return 8; }\n")))  # fmt: skip
        put(library, other)
        put(build.checksum_path(library), checksum(other))


def instead_of_a_file(rng: random.Random, path: Path, folder: Path) -> None:
    """A folder, a link, a pipe."""
    remove(path)
    way = rng.randrange(5)
    if way == 0:
        path.mkdir()
    elif way == 1:
        os.mkfifo(path, 0o600)
    else:
        path.symlink_to((folder / "nowhere", path, "/dev/null")[way - 2])


# ---- What becomes of it --------------------------------------------------------------------------------------


def cache_folder(rng: random.Random) -> str:
    """the folder of the compiled kernels: cut, changed, replaced by links, pipes and other libraries, leftovers, a
    held lock, permissions; right numbers, or PyTorch's operators and a sentence, and made anew where it can be"""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "decoders"
        folder.mkdir(mode=0o700)
        library = folder / NAME
        put(library, image())
        put(build.checksum_path(library), checksum(image()))
        times = rng.choice((0, 1, 1, 2, 3))
        for _ in range(times):
            damage(rng, folder, library)
        if rng.random() < 0.005:
            return answered_by_a_process(Path(base), folder, library)
        is_held = rng.random() < 0.2
        before = decided(Path(base), is_held)
        if not times and not before.startswith("in use"):
            raise Failed(f"a whole library is {before}")
        if not is_held:
            rebuilt(library)
        return "answered" if before.startswith("in use") else "refused"


def decided(base: Path, is_held: bool) -> str:
    """The status of a fresh process; whoever holds the lock of the folder, it waits for nobody."""
    with standing_for_the_large_one(base) as state, contextlib.ExitStack() as stack:
        if is_held:
            descriptor = os.open(base / "decoders", os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        found, status = native.library(), str(state.status)
    in_use, known = (
        status.startswith("in use"),
        status.startswith(("in use", "not in use: ", "being compiled")),
    )
    if not known or "\n" in status or in_use != (found is not None):
        raise Failed(f"the status is {status!r}")
    if found is not None and found.seven() != 7:
        raise Failed("a library is in use that gives wrong numbers")
    closed(found)
    return status


@contextlib.contextmanager
def standing_for_the_large_one(base: Path) -> Iterator[native.State]:
    """Of the same decisions, on any processor; nothing is compiled."""
    state = native.State()
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (native, "STATE", state),
            (native, "target_for", lambda processor: (build.TARGETS[0], "")),
            (native, "gives_the_right_numbers", lambda library: library.seven() == 7),
            (native.calls, "declare", lambda library: library),
            (build, "library_path", lambda folder, *rest: folder / NAME),
            (build, "start", lambda *rest: None),
            (tempfile, "tempdir", str(base)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(base)}))
        yield state


def rebuilt(library: Path) -> None:
    """What compiles runs over the folder: the library is right then, unless a file cannot be written there."""
    try:
        with mock.patch.object(build, "compiled", lambda *rest: image()):
            build.build("gcc", build.SOURCE, library, [])
    except OSError:
        if not [path for path in library.parent.iterdir() if path.is_dir() and not path.is_symlink()]:
            raise
        return
    if hashlib.sha256(library.read_bytes()).hexdigest().encode() != checksum(image()):
        return  # whole, with its checksum, of another source: not made anew, and not believed
    found = build.load(library)
    if found is None or found.seven() != 7:
        raise Failed("the library is not right after it was made anew")
    closed(found)


def closed(library: ctypes.CDLL | None) -> None:
    """Thousands of them would be too many."""
    if library is not None:
        _ctypes.dlclose(library._handle)


def answered_by_a_process(base: Path, folder: Path, library: Path) -> str:
    """A text by the command, with a compiler that refuses: whatever stands in the folder, which is no library
    of the real functions."""
    compiler = base / "gcc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    processor = native.processor_flags()
    target, _ = native.target_for(processor)
    flags = [*target.flags, native.TUNED] if target else []
    wanted = build.library_path(folder, str(compiler), flags, processor)
    build_name = {library: wanted, build.checksum_path(library): build.checksum_path(wanted)}
    for old, new in build_name.items():
        if os.path.lexists(old):
            old.rename(new)
    path = f"{base}{os.pathsep}{os.environ.get('PATH', '')}"
    changes = {"XDG_CACHE_HOME": str(base), "PATH": path, "TMPDIR": str(base)}
    command = [sys.executable, "-m", "decoders", "generate", "checkpoints/tiny-phi3", "Once upon"]
    process = subprocess.run(
        [*command, "--max-new-tokens", "6"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **changes},
    )
    if process.returncode or process.stdout != expected():
        raise Failed(f"status {process.returncode}: {process.stdout!r:.100} {process.stderr[-300:]!r}")
    return "answered"
