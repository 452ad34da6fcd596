"""`kernels.c` is compiled once for each processor, compiler and version of the source, and kept in the user's
cache folder: `~/.cache/decoders`, or below `XDG_CACHE_HOME`. A wheel that was built where a compiler is holds
the libraries for this kind of machine (see `setup.py`).

As a script this file is the process that compiles, which goes on when its parent ends:

    python build.py COMPILER SOURCE TARGET FLAG...

The compiler writes into memory, so that nothing is left of it when it is killed. What it has made is written
beside its place, synced and renamed, with a checksum. One process at a time does it, holding a lock on the
folder; the others find the library there when it is their turn.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parent / "plan.c"
COMPILER_LIMIT = 600  # seconds: nobody waits for it, but it shall not stay for ever

# ---- Instructions ------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """Instructions that `kernels.c` is compiled for."""

    name: str
    machine: str  # as `platform.machine()` has it
    needed: frozenset[str]  # as /proc/cpuinfo calls them
    flags: tuple[str, ...]  # of the compiler


AVX512 = Target(
    "AVX-512",
    "x86_64",
    frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}),
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx512vnni", "-mfma", "-mf16c")
    + ("-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"),
)
AVX2 = Target(  # see `avx2.h`
    "AVX2",
    "x86_64",
    frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt"}),
    ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-ffp-contract=off"),
)
NEON = Target(  # see `neon.h`
    "NEON",
    "aarch64",
    frozenset({"asimd", "asimddp", "atomics"}),
    ("-march=armv8.2-a+dotprod", "-ffp-contract=off"),
)
NEON_BF16 = Target(
    "NEON-BF16",
    "aarch64",
    NEON.needed | {"bf16"},
    ("-march=armv8.2-a+dotprod+bf16", "-ffp-contract=off"),
)
TARGETS = (AVX512, AVX2, NEON_BF16, NEON)  # the best first of each kind of machine


def targets_here() -> list[Target]:
    """Those for this kind of machine."""
    if platform.system() != "Linux":
        return []
    return [target for target in TARGETS if target.machine == platform.machine()]


# ---- Where it is kept --------------------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """Where libraries are kept; None where there is no such folder of this user alone."""
    with suppress(OSError, RuntimeError):  # a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decoders"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and is_own(folder.stat()):
            return folder
    return None


def is_own(status: os.stat_result) -> bool:
    """Of this user, and nobody else can write to it."""
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def library_path(folder: Path, compiler: str, flags: list[str], processor: set[str]) -> Path:
    """A name for each source, compiler and processor."""
    status = os.stat(compiler)
    version = f"{os.path.realpath(compiler)} {status.st_size} {status.st_mtime_ns}"
    ingredients = [*flags, version, *sorted(processor)]
    return folder / f"kernels-{digest(ingredients)}.so"


def packaged_path(target: Target) -> Path:
    """Where a wheel has the library of this source."""
    return Path(__file__).parent / "built" / f"{target.name}-{digest(target.flags)}.so"


def digest(ingredients: Sequence[str]) -> str:
    """Of the source and what it is compiled with."""
    sha256 = hashlib.sha256("\n".join(ingredients).encode())
    for source in sorted(SOURCE.parent.glob("*.[ch]")):  # which includes the others
        sha256.update(source.read_bytes())
    return sha256.hexdigest()[:16]


def checksum_path(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


# ---- Read --------------------------------------------------------------------------------------------------


def load(library: Path, is_trusted: Callable[[os.stat_result], bool] = is_own) -> ctypes.CDLL | None:
    """The library, if it is there, whole, and this user's own."""
    try:
        checksum = read(checksum_path(library), is_trusted).decode()
        if checksum != hashlib.sha256(read(library, is_trusted)).hexdigest():
            return None
        return ctypes.CDLL(str(library))
    except (OSError, ValueError):
        return None


def load_packaged(target: Target) -> ctypes.CDLL | None:
    """The library of a wheel, if it is there and whole."""
    return load(packaged_path(target), is_as_this_file)


def is_as_this_file(status: os.stat_result) -> bool:
    """Installed by whom this file was, and nobody can write to it who cannot write to this file."""
    own = os.stat(__file__)
    return status.st_uid == own.st_uid and not status.st_mode & ~own.st_mode & 0o022


def read(path: Path, is_trusted: Callable[[os.stat_result], bool]) -> bytes:
    """The bytes of a regular file. OSError for one that others can write to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not is_trusted(status):
            raise PermissionError(f"{path} is not a file of this user alone")
        return file.read()


# ---- Made --------------------------------------------------------------------------------------------------


def start(compiler: str, library: Path, flags: list[str]) -> subprocess.Popen:
    """The process that compiles. It is in nobody's way: of low priority, and deaf to the terminal."""
    command = [sys.executable, "-I", "-S", __file__, compiler, str(SOURCE), str(library), *flags]
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent, start_new_session=True)


def build(compiler: str, source: Path, library: Path, flags: list[str]) -> None:
    """Compile, unless another process has done it in the meantime."""
    folder = os.open(library.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # gone with this process, however it ends
        if load(library) is None:
            image = compiled(compiler, source, flags)
            write(checksum_path(library), hashlib.sha256(image).hexdigest().encode())
            write(library, image)
            os.fsync(folder)
    finally:
        os.close(folder)


def compiled(compiler: str, source: Path, flags: list[str]) -> bytes:
    """The bytes of the library; CalledProcessError where the source is refused."""
    code, library = os.memfd_create("code"), os.memfd_create("library")
    code_file, library_file = (f"/proc/self/fd/{descriptor}" for descriptor in (code, library))
    steps = (
        ["-O3", "-fPIC", "-pipe", "-fopenmp", *flags, "-c", str(source), "-o", code_file],
        ["-shared", code_file, "-o", library_file],  # not linked to another runtime of OpenMP
    )
    for step in steps:
        subprocess.run(
            [compiler, *step], pass_fds=(code, library), check=True, timeout=COMPILER_LIMIT, cwd="/"
        )
    return Path(library_file).read_bytes()


def write(path: Path, content: bytes) -> None:
    """All of it or nothing, also where power fails. The lock is held: no other process has this name."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)  # left by a process that was killed, whatever it is
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    os.replace(beside, path)


if __name__ == "__main__":
    os.nice(10)
    build(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
