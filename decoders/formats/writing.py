"""One file that is written: all of it or nothing. For a folder of files that change together see `switch`."""

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

Content = str | bytes | Callable[[BinaryIO], Any]  # or what writes it into a stream


def write_file(path: str | Path, content: Content) -> Path:
    """Write `content` to `path`, which is returned.

    A regular file is replaced at once, and keeps its permissions; a new one gets those of the umask. Links
    are followed. Pipes, terminals and devices such as /dev/stdout are written into; folders, sockets and
    disks are refused. OSError, in a sentence, where it cannot be written; then all is as it was.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode if path.exists() else None
        check_kind(path, mode)
        if mode is None or stat.S_ISREG(mode):
            replace_file(Path(os.path.realpath(path)), content, mode)
        else:
            with open(path, "wb") as stream:
                put(stream, content)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from None
    return path


def check_writable(path: str | Path) -> None:
    """OSError, in a sentence, where `write_file` would fail: before anything is computed for it."""
    path = Path(path)
    try:
        mode = path.stat().st_mode if path.exists() else None
        check_kind(path, mode)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from None
    folder = Path(os.path.realpath(path)).parent
    is_replaced = mode is None or stat.S_ISREG(mode)
    if is_replaced and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise OSError(f"{path} cannot be written: give a file in a folder that exists and can be written to")


def check_kind(path: Path, mode: int | None) -> None:
    if mode is None:
        return
    if stat.S_ISDIR(mode):
        raise OSError("it is a folder")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OSError("it is a disk or a socket, not a file")


def replace_file(file: Path, content: Content, mode: int | None) -> None:
    aside = file.parent / f".writing-{secrets.token_hex(6)}"
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as stream:
            if mode is not None:
                os.fchmod(descriptor, stat.S_IMODE(mode))
            put(stream, content)
            stream.flush()
            os.fsync(descriptor)
        os.replace(aside, file)
    except BaseException:  # Ctrl-C too
        aside.unlink(missing_ok=True)
        raise


def put(stream: BinaryIO, content: Content) -> None:
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    if isinstance(content, bytes):
        stream.write(content)
    else:
        content(stream)
