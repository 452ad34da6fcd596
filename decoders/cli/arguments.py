"""Options: what generate, chat and look have in common, and a parser that knows what was meant."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


def program_name() -> str:
    """As the user called it: `decoders`, or `python -m decoders`."""
    name = Path(sys.argv[0]).name
    return "decoders" if name in ("decoders", "decoders.exe") else "python -m decoders"


class Parser(argparse.ArgumentParser):
    """Its errors are one line: not the usage of all options before it. One of an unknown option names the
    nearest known one."""

    def error(self, message: str) -> NoReturn:
        """To standard error. Exit status 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = super().parse_known_args(args, namespace)
        if unknown := [word for word in rest if word.startswith("--")]:
            self.refuse(unknown)
        return known, rest

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """The error that names the unknown options."""
        hints = []
        for word in unknown:
            name = word.partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            hints.append(f"{name} (did you mean {near[0]}?)" if near else name)
        self.error(f"unrecognized arguments: {' '.join(hints)}")


def add_sampling(option: Callable[..., Any], new_tokens: int) -> None:
    """What generate, chat and look have in common."""
    option(
        "--max-new-tokens",
        type=int,
        default=new_tokens,
        metavar="N",
        help=f"at most N (default: {new_tokens})",
    )
    option("--temperature", type=float, metavar="T", help="sample; below 1 safer, above bolder; 0 is greedy")
    option("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    option("--top-p", type=float, metavar="P", help="nucleus: the likeliest tokens of total probability P")
    option("--repetition-penalty", type=float, metavar="R", help="above 1: avoid tokens seen before")
    option("--seed", type=int, help="makes sampling repeatable")
    option("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    option("--quantize", choices=("int8", "int8-weights", "int4"), help="less memory, faster, less exact")
    option("--cache", choices=("int8",), help="keys and values of 8 bits: half the memory of long texts")
    option(
        "--prefill",
        choices=("int8", "exact"),
        help="with 4-bit weights, long prompts round activations to 8 bits (default of --quantize), or not",
    )
    option(
        "--packed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute with the 4 and 8 bits of a packed checkpoint where that is possible",
    )
    option(
        "--adapter",
        action="append",
        metavar="FOLDER[=WEIGHT]",
        help="merge a LoRA, as peft saves it; may be given several times",
    )
    option("--device", default="cpu", help="cpu, cuda, mps ... (default: cpu)")


def add_strategies(option: Callable[..., Any]) -> None:
    """Ways to decode: docs/decoding.md says what each is good for."""
    option("--num-beams", type=int, default=1, metavar="N", help="beam search: follow N texts, give the best")
    option("--length-penalty", type=float, metavar="P", help="of beams: above 0 favours long texts")
    option("--num-return-sequences", type=int, default=1, metavar="N", help="N texts, with beams or sampling")
    option("--min-p", type=float, metavar="P", help="sample from tokens of at least P times the best chance")
    option("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens in a row twice")
    option("--prompt-lookup", type=int, metavar="N", help="draft N tokens from the text itself")
    option("--assistant", metavar="MODEL", help="speculative decoding: a smaller model drafts tokens")
    option("--guidance-scale", type=float, metavar="S", help="classifier-free guidance: above 1")
    option("--negative-prompt", metavar="TEXT", help="what --guidance-scale leads away from")
    option("--compile", action="store_true", help="steps as one graph of torch.compile, which takes a minute")
    option("--stop", action="append", metavar="TEXT", help="end after TEXT; may be given several times")
    option("--choices", metavar="FILE", help="answer with one of the lines of FILE")
