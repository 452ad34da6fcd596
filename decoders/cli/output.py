"""Streams and exit codes: what goes to standard output and standard error, and how an error reads."""

import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

EXIT_DIFFERENT, EXIT_UNUSABLE, EXIT_INTERRUPTED = 1, 2, 130

# What a terminal would obey: control characters, and marks that change the direction of text.
TERMINAL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def print_result(text: str) -> None:
    """To standard output at once: as it is into a file or pipe, escaped on a terminal."""
    sys.stdout.write(escaped(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_note(text: str) -> None:
    """To standard error. A note that nobody can read stops nothing."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def escaped(text: str) -> str:
    """Names and texts of others, with terminal codes spelled out."""
    return TERMINAL_CODES.sub(lambda code: repr(code[0])[1:-1], text)


def one_line(error: BaseException) -> str:
    """What went wrong in one line; the system's own errors without their numbers."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return escaped(" ".join(text.splitlines()))


# ---- Closed streams ----------------------------------------------------------------------------------------


class ClosedStream:
    """In place of a stream that was closed before Python started. Reading or writing is an OSError."""

    encoding = "utf-8"

    def __init__(self, name: str):
        self.name = name

    def refuse(self, *args: Any) -> NoReturn:
        raise OSError(f"{self.name} is closed")

    read = readline = write = refuse

    def isatty(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return self.refuse()


def open_closed_streams() -> None:
    """Give a closed stream a place: else the next file that is opened gets its number, and what a library
    writes to standard error lands in it."""
    for number, name in ((0, "standard input"), (1, "standard output"), (2, "standard error")):
        try:
            os.fstat(number)
        except OSError:
            placeholder = os.open(os.devnull, os.O_RDWR)
            if placeholder != number:  # Python opened something there itself
                os.dup2(placeholder, number)
                os.close(placeholder)
            setattr(sys, ("stdin", "stdout", "stderr")[number], ClosedStream(name))


def standard_input() -> str:
    """All of it. ValueError where it is no text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {sys.stdin.encoding}: {error}") from None


@contextmanager
def output_to_stderr() -> Iterator[None]:
    """What a port prints goes to standard error, from whatever language: the answer has the output alone."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


# ---- Numbers for people ------------------------------------------------------------------------------------


def human_bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def peak_memory() -> int:
    """Bytes that this process has had in memory at most, mapped weights included."""
    status = Path("/proc/self/status")  # getrusage counts what the parent had when it started this process
    if status.exists() and (high_water := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(high_water[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- What is there already ---------------------------------------------------------------------------------


def check_new(path: Path, force: bool = False) -> None:
    """FileExistsError where a checkpoint would be written over something, unless `force`. What a writer that
    was killed has left (`.saving-...`) is nothing."""
    is_filled = path.is_dir() and any(not file.name.startswith(".saving-") for file in path.iterdir())
    if force or not (is_filled or path.is_file()):
        return
    what = "is not empty" if is_filled else "exists"
    raise FileExistsError(f"{path} {what}: give another OUT, remove it, or write over it with --force")


def check_page(path: str | Path) -> None:
    """FileExistsError where a page would replace something else than a page, as a wrong name would."""
    path = Path(path)
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            if not file.read(100).lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise FileExistsError(f"{path} exists and is no page: give another file, or remove it")


# ---- Progress ----------------------------------------------------------------------------------------------


class Progress:
    """A streamer that shows the prompt, then passes everything on, and notes when it came."""

    def __init__(self, prompt: str, show: Callable[[str], Any], stream: Any):
        self.prompt, self.show, self.stream = prompt, show, stream
        self.times: list[float] = []

    def put(self, ids: Any) -> None:
        if not self.times:
            self.show(self.prompt)
        self.times.append(time.perf_counter())
        self.stream.put(ids)

    def end(self) -> None:
        self.stream.end()

    def report(self, prompt_tokens: int) -> str:
        new, times = len(self.times) - 1, self.times
        text = f"{prompt_tokens} prompt + {new} new tokens"
        if new > 0:
            text += f", first after {times[1] - times[0]:.2f} s"
        if new > 1:
            text += f", then {(new - 1) / (times[-1] - times[1]):.1f} tokens/s"
        return text
