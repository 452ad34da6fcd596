"""The files of a folder change all at once or not at all, whatever happens meanwhile.

New files are written and synced in a hidden folder `.saving-...` inside; to rename that to `.saved-...` is
the switch. Then they are moved into place, stale ones are removed, and `.saved-...` goes. Whoever finds one,
a reader or the next writer, ends the moving first: a folder whose writer was killed holds the old files or
the new ones.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

CHECKPOINT = (
    ".json",
    ".safetensors",
    ".gguf",
    ".bin",
    ".msgpack",
    ".h5",
    ".pt",
    ".model",
    ".bpe",
    ".jinja",
    "merges.txt",
)
STALE = ".stale.json"  # among the new files: the names of old ones that have no place beside them


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone holds the folder; the system takes the lock back from a killed one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def switched(folder: Path, stale: Callable[[], set[str]] = set) -> Iterator[Path]:
    """A folder to write into. On leaving, its files are those of `folder`, and those that `stale` names and
    that were not written are gone. An OSError, as of a full disk, names the folder. An error of any kind
    leaves all as it was: a folder that was not there is not there.

    Files get the permissions of the umask. A link among the old files is replaced, what it leads to stays:
    it may be the hub's cache. Pipes and devices in a file's place are refused.
    """
    aside = None
    with without_remains(folder), errors_named(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as locks:
                with locked(folder):
                    move(folder)
                    clean(folder)
                    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
                    locks.enter_context(locked(aside))
                yield aside
                names = {file.name for file in aside.iterdir()}
                check_regular(folder, names)
                for name in names:
                    sync(aside / name)
                with locked(folder):
                    move(folder)  # what another writer, killed meanwhile, has decided
                    (aside / STALE).write_text(json.dumps(sorted(stale() - names)))
                    for name in names:  # safetensors lets the owner alone read what it writes
                        shutil.copymode(aside / STALE, aside / name)
                    sync(aside / STALE)
                    sync(aside)
                    aside = aside.rename(folder / aside.name.replace(".saving-", ".saved-"))
                    sync(folder)
                    move(folder)
        finally:
            if aside is not None and aside.name.startswith(".saving-"):
                shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def without_remains(folder: Path) -> Iterator[None]:
    """Of an error no empty folder stays: neither `folder` nor those above it, where they were missing."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        yield
    except BaseException:  # Ctrl-C too
        for each in missing:  # the innermost first
            with suppress(OSError):  # somebody else has put something there
                each.rmdir()
        raise


@contextmanager
def errors_named(folder: Path) -> Iterator[None]:
    """The system's errors, with the folder's name, whatever library they come through."""
    try:
        yield
    except OSError as error:
        if str(folder) in str(error):
            raise
        cause = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        raise OSError(error.errno, f"{folder} cannot be written: {cause}") from error
    except Exception as error:  # they come through safetensors as its own kind
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        cause = os.strerror(int(number[1]))
        raise OSError(int(number[1]), f"{folder} cannot be written: {cause}") from error


def check_regular(folder: Path, names: Iterable[str]) -> None:
    """OSError where something else than a file or a link stands in the place of one that is to be written."""
    for name in names:
        file = folder / name
        if file.exists() and not file.is_file():
            raise OSError(f"{file} is no regular file: it is not replaced")


def clean(folder: Path) -> None:
    """Under the lock: away with what killed writers left, which no longer hold theirs."""
    for left in folder.glob(".saving-*"):
        with suppress(OSError), locked(left, wait=False) as alone:
            if alone:
                shutil.rmtree(left)


def decided(folder: Path) -> list[Path]:
    """What writers have decided and not yet moved. A link may lead out of the folder: it is none."""
    return [aside for aside in folder.glob(".saved-*") if aside.is_dir() and not aside.is_symlink()]


def finish(folder: Path) -> None:
    """End what a writer has decided, but was killed before it moved all files."""
    if decided(folder):
        with locked(folder):
            move(folder)


def move(folder: Path) -> None:
    """Under the lock: new files into place, stale ones away. The folder may be a stranger's: nothing outside
    of it is touched. ValueError if its list of stale files is not one."""
    for aside in decided(folder):
        stale = aside / STALE
        names = stale_names(stale)
        if other := [file for file in aside.iterdir() if not file.is_file()]:
            raise ValueError(f"{other[0]} is not a file: no save wrote it, remove {aside}")
        for file in sorted(aside.iterdir()):
            if file != stale:
                os.replace(file, folder / file.name)
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(folder / name)
        stale.unlink(missing_ok=True)
        aside.rmdir()
    sync(folder)


def stale_names(stale: Path) -> list[str]:
    """Empty where a writer was killed after it had removed the list."""
    if not stale.exists():
        return []
    try:
        names = json.loads(stale.read_bytes()) if stale.is_file() else None
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(map(is_name, names)):
        raise ValueError(f"{stale} is not a list of file names: no save wrote it, remove {stale.parent}")
    return names


def is_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and "\0" not in name and Path(name).name == name


def stamp(folder: Path) -> set[tuple]:
    """Which files of a checkpoint there are: another after any save. A log beside them may grow."""
    states = set()
    for file in os.scandir(folder if folder.is_dir() else folder.parent):
        if file.name.startswith(".saved-") or file.name.endswith(CHECKPOINT):
            with suppress(FileNotFoundError):  # it went meanwhile
                state = file.stat()
                states.add((file.name, state.st_ino, state.st_mtime_ns, state.st_size))
    return states
