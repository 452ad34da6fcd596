"""How long a fuzzer runs: so many cases, so many seconds, or both. Tests give cases alone: no clock decides."""

import argparse
import itertools
import time
from collections.abc import Iterator


def numbers(cases: int | None = None, seconds: float | None = None) -> Iterator[int]:
    """0, 1, 2 ... while there is a budget."""
    if cases is None and seconds is None:
        raise ValueError("a fuzzer needs a number of cases or of seconds")
    end = time.monotonic() + (seconds or 0)
    for number in itertools.count():
        if cases is not None and number >= cases:
            return
        if seconds is not None and time.monotonic() >= end:
            return
        yield number


def arguments(about: str | None) -> argparse.Namespace:
    """--seed, --cases and --minutes; a minute where neither is given."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--minutes", type=float)
    args = parser.parse_args()
    if args.cases is None and args.minutes is None:
        args.minutes = 1
    args.seconds = None if args.minutes is None else 60 * args.minutes
    return args
