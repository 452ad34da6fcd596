"""All fuzzers, one after the other, and the table of what they found: python -m tests.fuzz --minutes 10 --seed 3 --write

Strings, folders, damage and each kind of use run for so many minutes, settings of `generate` for so many cases of two
seeds. Exit status 1 if any found something; --write puts the table into docs/reliability.md, failures included.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from decoders.formats import write_file
from tests.fuzz import calls, damage, folders, saves, settings, strings, uses

TABLE = Path(__file__).parents[2] / "docs" / "reliability.md"
INTRODUCTION = """# What is tried, how often, with what result

Written by `python -m tests.fuzz --write` (seed {seed}; {minutes:g} minutes for each fuzzer that has no number
of cases). A short run of each, with other seeds, is part of `make test`; `make fuzz MINUTES=60 SEED=3`
runs them for as long as you like, and prints what it finds as a test, shrunk to the smallest case.

| tried | how often | result |
| --- | ---: | --- |
"""


def rows(minutes: float, seed: int, cases: int) -> tuple[list[tuple[str, str, str]], list[str]]:
    found, failures = [], []
    counts, failed = strings.run(seed, seconds=60 * minutes)
    names = ", ".join(sorted(counts))
    found.append((f"random strings, ids compared with Hugging Face's fast tokenizer: runs, any code point, pieces glued together; {names}",
                  f"{sum(counts.values()):,}", f"{len(failed)} differ"))  # fmt: skip
    failures += failed
    for what, fuzzer in (
        ("any JSON in any field of a folder's small files", folders),
        (
            "bytes of weights (five layouts, inside archives too), vocabularies and configs flipped, cut, swapped",
            damage,
        ),
    ):
        counts, failed = fuzzer.run(seed, seconds=60 * minutes)
        shown = f"{counts['answered']:,} answered, {counts['refused']:,} refused in a sentence that names the file, {counts['failed']} else"
        found.append((f"{what}; then loaded and asked for two tokens", f"{sum(counts.values()):,}", shown))
        failures += failed
    kinds = {**uses.KINDS, **calls.KINDS}
    for kind, case in kinds.items():
        counts, failed = uses.run(kind, seed, seconds=60 * minutes, kinds=kinds)
        what = " ".join((case.__doc__ or "").split())
        result = f"{counts['answered']:,} answered, {counts['refused']:,} refused in a sentence, {counts['failed']} else"
        found.append((f"{kind}: {what}", f"{sum(counts.values()):,}", result))
        failures += failed
    for own in (seed, seed + 1):
        seen_settings, failed = settings.run_cases(cases // 2, own)
        found.append(row_of_settings(own, seen_settings))
        failures += failed
    with tempfile.TemporaryDirectory() as base:
        seen = saves.kills(Path(base), 1000, random.Random(seed))
        found.append(("a writer killed at a random step while it saves over another model", f"{sum(seen.values()):,}",
                      f"{seen[1]} times the one, {seen[2]} times the other model whole, never neither"))  # fmt: skip
        for writers, word in ((1, "one writer"), (2, "two writers, one of them in shards")):
            whole, refused = saves.reads(Path(base), 1000, writers)
            found.append((f"a folder read beside {word} that never rest", f"{whole + refused:,}",
                          f"{whole} read whole, {refused} times said that it is being written, no mixture"))  # fmt: skip
    return found, failures


def row_of_settings(seed: int, counts: Counter) -> tuple[str, str, str]:
    what = (
        "documented settings of `generate` over the six families, batches and padding: cached as uncached, in chunks, "
        "from a cache, a sequence as it is alone, embeddings as ids, prepared as plain, and as Transformers "
        f"{version('transformers')}; odd ids and NaN refused (seed {seed})"
    )
    result = (
        f"{counts['answered']:,} agree, {counts['rounded']:,} but for rounding, "
        f"{counts['refused']:,} refused in a sentence, {counts['failed']} else"
    )
    return what, f"{sum(counts.values()):,}", result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000, help="of settings")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, failures = rows(args.minutes, args.seed, args.cases)
    text = INTRODUCTION.format(seed=args.seed, minutes=args.minutes) + "".join(
        f"| {' | '.join(row)} |\n" for row in found
    )
    if failures:
        text += "\nFound, as tests:\n\n" + "\n".join(failures) + "\n"
    if args.write:
        write_file(TABLE, text)
    print(text)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
