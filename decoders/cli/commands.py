"""The parser of all commands, and what becomes of errors.

Only the result goes to standard output; timings, bars, notes and errors go to standard error.
Exit status: 0 success, 1 a check that found a difference, 2 unusable input, 130 interrupted.
"""

import argparse
import importlib
import os
import sys
import traceback
from contextlib import suppress
from typing import Any

from decoders import __version__

from .arguments import Parser, add_sampling, add_strategies, program_name
from .output import (
    EXIT_INTERRUPTED,
    EXIT_UNUSABLE,
    ClosedStream,
    one_line,
    open_closed_streams,
    print_note,
)
from .threads import choose_wait_policy

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
COMMANDS = {  # command -> the module with its `run`, which imports torch
    "generate": ".generate",
    "chat": ".chat",
    "inspect": ".inspect_checkpoint",
    "compare": ".compare",
    "convert": ".convert",
    "look": ".look",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; `sys.argv` where none is given. The exit status."""
    open_closed_streams()
    args = completed(parser()).parse_args(arguments)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars are for terminals
    choose_wait_policy()
    try:
        command = importlib.import_module(COMMANDS[args.command], __package__)
        status = command.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print_note("\ninterrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe had enough: not our error, and nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (ValueError, OSError, ImportError) as error:
        print_note(f"error: {one_line(error)}")
    except Exception:  # a mistake of ours: status 1 would say that a check found a difference
        if not isinstance(sys.stderr, ClosedStream):
            traceback.print_exc()
    return EXIT_UNUSABLE


def completed(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser itself. A shell that asks what may follow is answered by argcomplete, and this ends."""
    if "_ARGCOMPLETE" in os.environ:
        with suppress(ImportError):
            importlib.import_module("argcomplete").autocomplete(parser)
    return parser


def parser() -> argparse.ArgumentParser:
    parser = Parser(program_name(), description="Text from checkpoints, and what is in them.")
    parser.add_argument("--version", action="version", version=f"decoders {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    add_generate(commands)
    add_chat(commands)
    add_inspect(commands)
    add_compare(commands)
    add_convert(commands)
    add_look(commands)
    return parser


def add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="continue a prompt; greedy without a sampling option")
    option = generate.add_argument
    option("model", help="checkpoint folder or hub id")
    option("prompt", help="text to continue; - reads it from standard input")
    add_sampling(option, 200)
    add_strategies(option)
    option("--image", metavar="FILE", help="a picture, for models that see")
    option("--draw", metavar="FILE", help="write the picture with the answer's places to FILE")
    option("--chat", action="store_true", help="put the prompt into the model's chat format")
    option("--json", action="store_true", help="one JSON object instead of streamed text")
    option("--tensor-parallel", action="store_true", help="by all processes of torchrun")


def add_chat(commands: Any) -> None:
    about = """A conversation, a line a turn. /reset forgets it, /system TEXT says what to tell the model
        first, /help lists the commands, Ctrl-C stops an answer, /quit or Ctrl-D ends."""
    chat = commands.add_parser("chat", help="talk with a model in the terminal", description=about)
    chat.add_argument("model", help="checkpoint folder or hub id")
    chat.add_argument("--system", metavar="TEXT", default="", help="the system message")
    add_sampling(chat.add_argument, 1000)


def add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="what is in a checkpoint; reads headers only")
    inspect.add_argument("model", help="checkpoint folder or hub id")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def add_compare(commands: Any) -> None:
    about = """Where does a port differ, by how much more than rounding, and what is the mistake?
        --make KIT FAMILY writes a kit; KIT PORT compares a file of values (.safetensors, .npz), a function
        (module:function, file.py:function) or the installed "transformers" with it; FOLDER FOLDER two
        checkpoints, also packed ones, with --prompt TEXT their perplexity too; FOLDER transformers --prompt
        TEXT a checkpoint here and there. Exit status 0: equal
        within noise, 1: different, 2: unusable. docs/porting.md tells a whole story."""
    compare = commands.add_parser("compare", help="find out where a port differs, and why", description=about)
    option = compare.add_argument
    option("first", metavar="KIT", nargs="?", help="a kit, a checkpoint, or with --make a family")
    option("second", metavar="PORT", nargs="?", help="values, function, checkpoint or transformers")
    option("--make", metavar="KIT", help="write a kit of a family, or of a checkpoint's settings")
    option("--cases", metavar="NAMES", help="some of the cases, with commas between them")
    option("--seed", type=int, default=0, help="of a kit's weights (default: 0)")
    option("--layers", type=int, metavar="N", help="of a kit (default: 2)")
    option("--format", choices=("safetensors", "npz"), default="safetensors", help="of a kit's files")
    option("--compact", action="store_true", help="a kit below 300 kB, to be kept in a repository")
    option("--dtype", choices=("float64", "float32", "bfloat16", "float16"), help="what the port computes in")
    option("--prompt", metavar="TEXT", help="of a checkpoint here and in Transformers, or of two")
    option("--tolerance", type=float, metavar="T", help="relative error of tensors that are the same")
    option("--sequential", action="store_true", help="only one of the two models in memory")
    option("--json", action="store_true", help="one JSON object instead of a table")
    option("--html", metavar="PAGE", help="write the table as a page, coloured")
    option("--all", action="store_true", help="every stage of every case, not of those that differ alone")


def add_convert(commands: Any) -> None:
    about = """A checkpoint of any era and packaging (GGUF, bitsandbytes, GPTQ ...) as a plain one of today,
        which Transformers loads: dequantised, with config and tokenizer. Or, of Phi and Phi-3, as a GGUF
        file for llama.cpp."""
    convert = commands.add_parser(
        "convert", help="a checkpoint as a plain one, or as GGUF", description=about
    )
    option = convert.add_argument
    option("model", help="checkpoint folder, .gguf file or hub id")
    option("output", metavar="OUT", help="a folder, or a .gguf file")
    option("--packaging", choices=("safetensors", "gguf"), help="(default: gguf for a .gguf file)")
    option(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of plain tensors (default: as stored)"
    )
    option("--type", choices=GGUF_TYPES, help="of a GGUF file's matrices (default: the dtype's)")
    option("--force", action="store_true", help="write over what OUT holds")


def add_look(commands: Any) -> None:
    about = """A page that shows a model think: probabilities of each token, attention, what the model would
        say after each layer (logit lens), direct logit attribution, magnitudes, and the block with its lines.
        One HTML file, which needs nothing else."""
    look = commands.add_parser("look", help="a page that shows a model think", description=about)
    option = look.add_argument
    option("model", help="checkpoint folder or hub id")
    option("prompt", help="text, or ids where a folder has no tokenizer; - reads it from standard input")
    option("-o", "--output", required=True, metavar="PAGE", help="the file to write, as page.html")
    option("--with", dest="other", metavar="PROMPT", help="a second text beside it, and the difference")
    option("--with-model", metavar="MODEL", help="the same text in a second model")
    option("--last", type=int, metavar="N", help="show the last N tokens of a long text")
    option("--chat", action="store_true", help="put the prompt into the model's chat format")
    option("--image", metavar="FILE", help="a picture, for models that see")
    add_sampling(option, 24)
