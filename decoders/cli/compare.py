"""`compare KIT PORT`: where a port differs, and which mistake it is. docs/porting.md has a whole story."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from decoders import compare
from decoders.formats import write_file

from .arguments import program_name
from .loading import open_checkpoint
from .output import (
    EXIT_DIFFERENT,
    EXIT_UNUSABLE,
    check_page,
    escaped,
    output_to_stderr,
    print_note,
    print_result,
    standard_input,
)


def run(args: argparse.Namespace) -> int:
    cases = None if args.cases is None else args.cases.split(",")
    if args.make is not None:
        return make(args, cases)
    if args.first is None or args.second is None:
        raise ValueError(f"compare needs a kit and a port: {program_name()} compare --help")
    if args.html is not None:
        check_page(args.html)
    try:
        report = report_of(args, cases)
    except compare.PortError as error:
        print_note(str(error).rstrip())
        return EXIT_UNUSABLE
    is_twins = isinstance(report, compare.Twins)
    if args.html is not None:
        if is_twins:
            raise ValueError("--html is for a kit and a port")
        write_file(args.html, compare.page(report))
    if args.json:
        print_result(json.dumps(report.as_json(), ensure_ascii=False, allow_nan=False) + "\n")
    else:
        print_result(escaped(str(report) if is_twins else report.text(args.all)) + "\n")
    return 0 if report.equal else EXIT_DIFFERENT


def make(args: argparse.Namespace, cases: list[str] | None) -> int:
    """Write a kit; over an older one, and over nothing else."""
    if args.first is None or args.second is not None:
        raise ValueError("--make KIT needs one family or checkpoint")
    folder = Path(args.make)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "kit.json").exists():
        raise FileExistsError(f"{folder} is not empty and holds no kit: give another folder")
    folder = compare.make(
        args.make,
        args.first,
        cases=cases,
        seed=args.seed,
        layers=args.layers,
        format=args.format,
        compact=args.compact,
    )
    print_note(f"{folder / 'KIT.md'} says what is in it")
    return 0


def report_of(args: argparse.Namespace, cases: list[str] | None) -> Any:
    second = Path(args.second)
    if second.is_dir() or (second.suffix == ".gguf" and second.exists()):
        return two_checkpoints(args)
    if args.tolerance is not None:
        raise ValueError("--tolerance is for two checkpoints: of a port the noise is known")
    if args.prompt is not None:
        return on_prompt(args)
    if not (Path(args.first) / "kit.json").exists():
        raise ValueError(
            f"{args.first} is no kit: {program_name()} compare --make {args.first} FAMILY "
            "writes one; a checkpoint needs a second one, or --prompt"
        )
    with output_to_stderr():
        return compare.run(args.first, args.second, dtype=args.dtype, cases=cases)


def two_checkpoints(args: argparse.Namespace) -> compare.Twins:
    """Tensor by tensor, and with a text its perplexity in both."""
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        raise ValueError(f"--tolerance must be a relative error such as 0.01, not {args.tolerance}")
    twins = compare.apart(args.first, args.second, args.tolerance)
    if args.prompt is not None:
        _, tokenizer = open_checkpoint(args.first)
        ids = tokenizer.encode(standard_input() if args.prompt == "-" else args.prompt)
        if len(ids) < 2:
            raise ValueError("the prompt is too short: a perplexity takes two tokens at least")
        first, second = (compare.perplexity(path, ids) for path in (args.first, args.second))
        twins.perplexity = first, second
    return twins


def on_prompt(args: argparse.Namespace) -> Any:
    """A checkpoint here and in Transformers, on one prompt."""
    if args.second != "transformers":
        raise ValueError(f"--prompt compares a checkpoint with transformers, not with {args.second}")
    folder, tokenizer = open_checkpoint(args.first)
    ids = tokenizer.encode(standard_input() if args.prompt == "-" else args.prompt)
    if not ids:
        raise ValueError("the prompt is empty")
    return compare.on_prompt(folder, ids, args.dtype or "float32", args.sequential, print_note)
