"""python -m decoders generate MODEL PROMPT | chat MODEL | inspect MODEL | compare KIT PORT.

Only the result goes to standard output; timings, bars, notes and errors go to standard error.
Exit status: 0 success, 1 a check that found a difference, 2 unusable input, 130 interrupted.
"""

import argparse
import json
import math
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_DIFFERENT, EXIT_UNUSABLE, EXIT_INTERRUPTED = 1, 2, 130
BIG = 1_000_000_000  # bytes of weights from which reading them deserves a bar


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """Names and texts of others, with what a terminal would obey written out: escapes, reversed order."""
    obeyed = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(obeyed, lambda found: repr(found[0])[1:-1], text)


def told(error: Exception) -> str:
    """What went wrong in one line; the system's own errors without their numbers."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return shown(" ".join(text.splitlines()))


def parser() -> argparse.ArgumentParser:
    about = "Text from checkpoints, and what is in them."
    parser = argparse.ArgumentParser("python -m decoders", description=about)
    names = "generate | chat | inspect | compare | look"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)

    generate = commands.add_parser("generate", help="continue a prompt; greedy without a sampling option")
    generate.add_argument("model", help="checkpoint folder or hub id")
    generate.add_argument("prompt", help="text to continue; - reads it from standard input")
    add_options(generate.add_argument, 200)
    add_strategies(generate.add_argument)
    generate.add_argument("--image", metavar="FILE", help="a picture, for models that see")
    generate.add_argument("--draw", metavar="FILE", help="write the picture with the answer's places to FILE")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat format")
    generate.add_argument("--json", action="store_true", help="one JSON object instead of streamed text")
    generate.add_argument("--tensor-parallel", action="store_true", help="by all processes of torchrun")

    about = (
        "A conversation, a line a turn. /reset forgets it, /system TEXT says what to tell the model "
        "first, Ctrl-C stops an answer, Ctrl-D ends."
    )
    chat = commands.add_parser("chat", help="talk with a model in the terminal", description=about)
    chat.add_argument("model", help="checkpoint folder or hub id")
    chat.add_argument("--system", metavar="TEXT", default="", help="what the model is told first")
    add_options(chat.add_argument, 1000)

    inspect = commands.add_parser("inspect", help="what is in a checkpoint; reads headers only")
    inspect.add_argument("model", help="checkpoint folder or hub id")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_compare(commands)
    add_look(commands)
    return parser


def add_compare(commands: Any) -> None:
    about = """Where does a port differ, by how much more than rounding, and what is the mistake?
        --make KIT FAMILY writes a kit; KIT PORT compares a file of values (.safetensors, .npz), a function
        (module:function, file.py:function) or the installed "transformers" with it; FOLDER FOLDER two
        checkpoints; FOLDER transformers --prompt TEXT a checkpoint here and there. Exit status 0: equal
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
    option("--dtype", choices=("float64", "float32", "bfloat16", "float16"), help="what the port computes in")
    option("--prompt", metavar="TEXT", help="of a checkpoint here and in Transformers")
    option("--sequential", action="store_true", help="only one of the two models in memory")
    option("--json", action="store_true", help="one JSON object instead of a table")
    option("--html", metavar="PAGE", help="write the table as a page, coloured")
    option("--all", action="store_true", help="every stage of every case, not of those that differ alone")


def add_look(commands: Any) -> None:
    about = """A page that shows a model think: each token's chances, attention, what the model would say
        after each layer, who wrote a token, magnitudes, and the block with its lines. One HTML file, which
        needs nothing else."""
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
    add_options(option, 24)


def add_options(option: Callable, new_tokens: int) -> None:
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
    option("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of total chance P")
    option("--repetition-penalty", type=float, metavar="R", help="above 1: avoid tokens seen before")
    option("--seed", type=int, help="makes sampling repeatable")
    option("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    option("--quantize", choices=("int8", "int8-weights", "int4"), help="less memory, faster, less exact")
    option("--device", default="cpu", help="cpu, cuda, mps ... (default: cpu)")


def add_strategies(option: Callable) -> None:
    """Ways to decode: docs/decoding.md says what each is good for."""
    option("--num-beams", type=int, default=1, metavar="N", help="follow N texts, give the likeliest")
    option("--length-penalty", type=float, metavar="P", help="of beams: above 0 favours long texts")
    option("--num-return-sequences", type=int, default=1, metavar="N", help="N texts, with beams or sampling")
    option("--min-p", type=float, metavar="P", help="sample from tokens of at least P times the best chance")
    option("--no-repeat-ngram-size", type=int, metavar="N", help="no row of N tokens twice")
    option("--prompt-lookup", type=int, metavar="N", help="faster where a text repeats itself: try N")
    option("--assistant", metavar="MODEL", help="faster: a smaller model proposes tokens")
    option("--guidance-scale", type=float, metavar="S", help="above 1: away from --negative-prompt")
    option("--negative-prompt", metavar="TEXT", help="what --guidance-scale leads away from")
    option("--compile", action="store_true", help="steps as one graph of torch.compile, which takes a minute")
    option("--stop", action="append", metavar="TEXT", help="end after TEXT; may be given several times")
    option("--choices", metavar="FILE", help="answer with one of the lines of FILE")


# ---- generate ----------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    if not args.tensor_parallel:
        return generate_here(args)
    from decoders import parallel

    if args.quantize:
        raise ValueError("--tensor-parallel and --quantize exclude each other")
    rank = os.environ.get("RANK", "0")
    try:
        with parallel.joined(args.device) as args.mesh:
            if args.prompt == "-":
                args.prompt = parallel.same(standard_input() if rank == "0" else None)
            args.draw = args.draw if rank == "0" else None
            return generate_here(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"--tensor-parallel, process {rank}: {told(error)}") from None


def generate_here(args: argparse.Namespace) -> int:
    import torch

    from decoders import decoding

    folder, tokenizer = opened(args.model)
    prompt = standard_input() if args.prompt == "-" else args.prompt
    sees = args.image is not None or args.draw is not None
    sight = Sight(folder, tokenizer, prompt, args) if sees else None
    if sight:
        ids = sight.inputs["input_ids"][0].tolist()
    else:
        ids = tokenizer.chat([{"role": "user", "content": prompt}]) if args.chat else tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty: this model needs at least one token to continue")
    start = time.perf_counter()
    model = loaded(folder, args)
    asked = settings(args, model, tokenizer, len(ids))
    asked |= strategy(args, tokenizer, ids, asked["eos_token_id"])
    taken = time.perf_counter() - start
    if args.num_beams > 1 or args.num_return_sequences > 1:
        return several(args, model, tokenizer, prompt, ids, asked, sight)
    pieces: list[str] = []

    answers = args.chat or sight is not None  # only the answer is shown, which begins with a space

    def show(text: str) -> None:
        text = text.lstrip() if answers and not any(pieces) else text
        pieces.append(text)
        if not args.json:
            write(text)

    stream = tokenizer.stream(show, skip_special_tokens=True, stops=tokenizer.chat_stops if args.chat else ())
    if sight:
        sight.show = show
    watch = Watch("" if answers else prompt, show, sight or stream)
    result = decoding.generate(
        model,
        torch.tensor([ids], device=args.device),
        streamer=watch,
        return_dict_in_generate=True,
        stopping_criteria=[lambda ids, logits: stream.stopped],
        **asked,
        **(sight.pictures if sight else {}),
    )
    new = result.sequences[0, len(ids) :].tolist()
    answer = {"prompt": prompt, "text": "".join(pieces[1:]), "prompt_ids": ids, "ids": new}
    if not args.json:
        write("\n")
    if sight:
        answer |= sight.answer()
    if args.json:
        answer["scores"] = scores_of(model, result.sequences, len(ids), sight)[0]
        write(json.dumps(answer, ensure_ascii=False) + "\n")
    stats = result.stats
    helped = f", {stats['accepted']} of {stats['drafted']} drafted tokens accepted" if stats else ""
    say(f"{watch.report(len(ids))}{helped}, loaded in {taken:.2f} s, peak memory {human(peak_memory())}")
    return 0


def several(
    args: argparse.Namespace, model: Any, tokenizer: Any, prompt: str, ids: list[int], asked: dict, sight: Any
) -> int:
    """Texts that are only known in the end: those of beams, or more than one. An empty line between them."""
    import torch

    from decoders import decoding

    start = time.perf_counter()
    result = decoding.generate(
        model,
        torch.tensor([ids], device=args.device),
        return_dict_in_generate=True,
        **asked,
        **(sight.pictures if sight else {}),
    )
    taken = time.perf_counter() - start
    texts, rows = [], []
    for row in result.sequences[:, len(ids) :].tolist():
        end = next((i + 1 for i, id in enumerate(row) if id in (asked["eos_token_id"] or ())), len(row))
        rows.append(row[:end])
        if sight:
            texts.append(sight.located(row[:end]).text)
        else:
            texts.append(tokenizer.decode([*ids, *row[:end]], True).removeprefix(tokenizer.decode(ids, True)))
    if args.json:
        answer = {"prompt": prompt, "texts": texts, "prompt_ids": ids, "ids": rows}
        scores = scores_of(model, result.sequences, len(ids), sight)
        answer["scores"] = [row[: len(own)] for row, own in zip(scores, rows, strict=True)]
        if result.sequences_scores is not None:
            answer["beam_scores"] = result.sequences_scores.tolist()
        write(json.dumps(answer, ensure_ascii=False) + "\n")
    else:
        alone = args.chat or sight is not None
        write("\n\n".join(text.strip() if alone else prompt + text for text in texts) + "\n")
    new = sum(map(len, rows))
    say(
        f"{len(ids)} prompt + {new} new tokens in {len(rows)} texts, {taken:.2f} s, "
        f"peak memory {human(peak_memory())}"
    )
    return 0


def scores_of(model: Any, sequences: Any, start: int, sight: Any) -> list[list[float]]:
    """Logarithms of the chances of the new tokens."""
    from decoders import decoding

    pictures = {
        key: value * len(sequences) if isinstance(value, list) else value.expand(len(sequences), -1)
        for key, value in (sight.pictures if sight else {}).items()
    }
    return decoding.score(model, sequences, **pictures)[:, start - 1 :].tolist()


def strategy(args: argparse.Namespace, tokenizer: Any, ids: list[int], eos: list[int] | None) -> dict:
    """The arguments of `decoding.generate` for the options of `add_strategies`."""
    import torch

    found: dict[str, Any] = {
        "num_beams": args.num_beams,
        "length_penalty": args.length_penalty,
        "min_p": args.min_p,
        "num_return_sequences": args.num_return_sequences,
        "no_repeat_ngram_size": args.no_repeat_ngram_size,
        "compiled": args.compile,
        "prompt_lookup_num_tokens": args.prompt_lookup,
        "guidance_scale": args.guidance_scale,
    }
    if args.stop:
        found |= {"stop_strings": args.stop, "tokenizer": tokenizer}
    if args.negative_prompt is not None:
        text = args.negative_prompt
        away = tokenizer.chat([{"role": "user", "content": text}]) if args.chat else tokenizer.encode(text)
        found["negative_prompt_ids"] = torch.tensor([away], device=args.device)
    if args.assistant is not None:
        folder, other = opened(args.assistant)
        if other.encode("Once upon a time, 1 2 3.") != tokenizer.encode("Once upon a time, 1 2 3."):
            raise ValueError(f"--assistant {args.assistant} has another vocabulary than the model")
        found["assistant_model"] = loaded(folder, args)
    if args.choices is not None:
        from decoders.formats.folder import read_text

        lines = [line for line in read_text(Path(args.choices)).splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--choices {args.choices} has no lines to choose from")
        found["prefix_allowed_tokens_fn"] = one_of(lines, tokenizer, ids, eos)
    return found


def one_of(lines: list[str], tokenizer: Any, ids: list[int], eos: list[int] | None) -> Callable:
    """What may follow, after a prompt `ids`, so that the text becomes one of `lines`; then a stop id."""
    if not eos:
        raise ValueError("--choices: this checkpoint has no token that ends a text")
    encoded = [tokenizer.encode(line, add_special_tokens=False) for line in lines]
    ways = [(*row, eos[0]) for row in encoded]

    def allowed(row: int, text: Any) -> list[int]:
        so_far = tuple(text[len(ids) :].tolist())
        n, begun = len(so_far), [way for way in ways if way[: len(so_far)] == so_far]
        return sorted({way[n] for way in begun if len(way) > n}) or eos[:1]

    return allowed


def standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {sys.stdin.encoding}: {error}") from None


class Sight:
    """A picture with the prompt about it, and a streamer of the answer, which shows places in pixels."""

    def __init__(self, folder: Path, tokenizer: Any, prompt: str, args: argparse.Namespace):
        from decoders import family, fuyu, read_config
        from decoders.formats import preprocessor

        config = read_config(folder)
        if family(config) != "fuyu":
            raise ValueError(f"--image: {args.model} takes no pictures")
        if args.image is None:
            raise ValueError("--draw needs a picture: --image FILE")
        if args.chat:
            raise ValueError("--image has no --chat: Fuyu was not trained on conversations")
        check_places(prompt)
        check_picture_name(args.draw)
        self.picture, self.draw_to = open_picture(args.image), args.draw
        patches = fuyu.FuyuImageProcessor(**preprocessor(folder, config))
        self.tokenizer, self.processor = tokenizer, fuyu.FuyuProcessor(patches, tokenizer)
        prompt = prompt.replace("\\n", "\n")  # which a shell leaves as it is
        prompt = prompt.removesuffix("\n") + "\n"  # Fuyu was trained on prompts that end so
        self.inputs = self.processor(prompt, self.picture)
        self.pictures = {key: self.inputs[key] for key in ("image_patches", "image_patches_indices")}
        self.special = {token.id for token in tokenizer.added.values() if token.special}
        self.show: Callable[[str], Any]  # of what is complete; set before the first put
        self.ids: list[int] = []
        self.shown = ""

    def put(self, ids: Any) -> None:
        if ids.dim() == 1:  # not the prompt
            self.ids += ids.tolist()
            self.show_more()

    def end(self) -> None:
        self.show_more(final=True)

    def located(self, ids: list[int]) -> Any:
        """Text and places of an answer."""
        width, height = self.picture.size
        ordinary = [id for id in ids if id not in self.special]
        return self.processor.post_process_box_coordinates([ordinary], [(height, width)])[0]

    def show_more(self, final: bool = False) -> None:
        """What is new, up to where a place or a character is not complete yet."""
        text = self.located(self.ids).text
        opened = [self.processor.id_of(tag) for tag in ("<0x00>", "<0x02>")]
        if final or not (text.endswith("\ufffd") or any(id in self.ids[-5:] for id in opened)):
            self.show(text[len(self.shown) :])
            self.shown = text

    def answer(self) -> dict[str, Any]:
        """Text and places; draws them if that was asked for."""
        found = self.located(self.ids)
        if self.draw_to is not None:
            draw_places(self.picture, found.places, self.draw_to)
            many = "" if len(found.places) == 1 else "s"
            say(f"{len(found.places)} place{many} drawn into {shown(self.draw_to)}")
        places = [{type(place).__name__.lower(): place._asdict()} for place in found.places]
        return {"text": found.text, "places": places}


def check_places(prompt: str) -> None:
    """ValueError for a tag that was left open, which Fuyu would take for a place all the same."""
    rest = re.sub(r"<(box|point)>[^<]*</\1>", "", prompt)
    if left := re.search(r"</?(box|point)>[^<]{,30}", rest):
        wanted = "<box>top, left, bottom, right</box> or <point>x, y</point>"
        raise ValueError(f"{left[0]!r} is no place: give {wanted}")


def check_picture_name(file: str | None) -> None:
    """ValueError for a name under which no picture can be written, before anything is computed."""
    if file is None:
        return
    from PIL import Image

    Image.init()
    folder = Path(file).absolute().parent
    if Image.EXTENSION.get(Path(file).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw {file!r}: give a name that ends in .png or .jpg")
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(file).is_dir():
        raise ValueError(f"--draw {file!r}: no file can be written there")


def open_picture(file: str) -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("pictures need Pillow: pip install 'decoders[images]'") from None
    if not Path(file).is_file():
        told = "is no regular file" if Path(file).exists() else "is missing"
        raise ValueError(f"the picture {file!r} {told}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
            image.load()
            return ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{file} is no picture that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{file} has more pixels than any honest picture") from None
    except (OSError, SyntaxError, EOFError, ValueError) as error:  # Pillow's words for damaged files
        if getattr(error, "filename", None):
            raise
        raise ValueError(f"{file} is damaged: {error}") from None


def draw_places(picture: Any, places: list, file: str) -> None:
    """A frame for a box, a ring for a point, in red with a white rim."""
    from PIL import ImageDraw

    image = picture.convert("RGB")
    draw, thick = ImageDraw.Draw(image), max(1, max(image.size) // 200)
    for place in places:
        if len(place) == 4:
            top, left, bottom, right = place
            corners = [min(left, right), min(top, bottom), max(left, right), max(top, bottom)]
            shape = draw.rectangle
        else:
            ring = 3 * thick
            corners, shape = [place.x - ring, place.y - ring, place.x + ring, place.y + ring], draw.ellipse
        rim = [corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1]
        shape(rim, outline="white", width=thick + 2)
        shape(corners, outline="red", width=thick)
    image.save(file)


def opened(path_or_id: str) -> tuple[Path, Any]:
    """The folder, of a family that is served here, and its tokenizer."""
    from decoders import family, find, read_config, tokenize

    folder = find(path_or_id)
    family(read_config(folder))
    return folder, tokenize.load(folder)


def loaded(folder: Path, args: argparse.Namespace) -> Any:
    """The model that generates text, with a bar if there is much to read and a terminal to show it."""
    import torch

    from decoders import FAMILIES, family, model_class, read_config, weights

    device = usable_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    bar = sys.stderr.isatty() and sum(f.stat().st_size for f in folder.glob("*") if f.is_file()) > BIG
    kind = family(read_config(folder))
    text_class = model_class({"model_type": kind, "architectures": [FAMILIES[kind][1]]})
    if args.seed is not None:
        if not -(2**63) <= args.seed < 2**64:
            raise ValueError(f"--seed must be from -2**63 to 2**64 - 1, not {args.seed}")
        torch.manual_seed(args.seed)
    if mesh := getattr(args, "mesh", None):
        from decoders import parallel

        return parallel.load(text_class, folder, mesh, dtype=dtype)
    return weights.load(text_class, folder, dtype=dtype, device=device, quantize=args.quantize, progress=bar)


def settings(args: argparse.Namespace, model: Any, tokenizer: Any, prompt: int) -> dict[str, Any]:
    """The arguments of `model.generate` that the options ask for, after a prompt of so many tokens."""
    limit, room = model.max_positions, args.max_new_tokens
    if limit is not None and room > limit - prompt + 1 > 0:
        room = limit - prompt + 1
        say(f"note: {room} new tokens fit after a prompt of {prompt} ({limit} positions)")
    filters = (args.temperature, args.top_k, args.top_p, getattr(args, "min_p", None))
    asked = any(option is not None for option in filters)
    return {
        "max_new_tokens": room,
        "do_sample": asked and args.temperature != 0,
        "temperature": args.temperature or 1.0,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "eos_token_id": stop_ids(model, tokenizer),
    }


def stop_ids(model: Any, tokenizer: Any) -> list[int] | None:
    """The checkpoint's own, or the tokenizer's where no config names any, as with phi-1 and phi-1.5."""
    own = model.special_ids("checkpoint", None)[0].tolist()
    last = None if tokenizer is None else tokenizer.eos_token_id
    return own or (None if last is None else [last])


class Watch:
    """A streamer that shows the prompt, then passes everything on, and notes when it came."""

    def __init__(self, prompt: str, show: Callable[[str], Any], stream: Any):
        self.prompt, self.show, self.stream, self.times = prompt, show, stream, []

    def put(self, ids: Any) -> None:
        if not self.times:
            self.show(self.prompt)
        self.times.append(time.perf_counter())
        self.stream.put(ids)

    def end(self) -> None:
        self.stream.end()

    def report(self, prompt: int) -> str:
        new, times = len(self.times) - 1, self.times
        text = f"{prompt} prompt + {new} new tokens"
        if new > 0:
            text += f", first after {times[1] - times[0]:.2f} s"
        if new > 1:
            text += f", then {(new - 1) / (times[-1] - times[1]):.1f} tokens/s"
        return text


def write(text: str) -> None:
    """As it is, but what a terminal would obey."""
    sys.stdout.write(shown(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def usable_device(name: str):
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} is not usable here: {str(error).splitlines()[0]}") from None
    return device


def peak_memory() -> int:
    """Bytes that this process has had in memory at most, mapped weights included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent had when it started this process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def human(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


# ---- chat --------------------------------------------------------------------------------------------------


def chat(args: argparse.Namespace) -> int:
    folder, tokenizer = opened(args.model)
    tokenizer.chat([{"role": "user", "content": "?"}])  # without a chat format it ends here
    talk = Conversation(loaded(folder, args), tokenizer, args)
    talk.tell(args.system)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        import readline  # noqa: F401  (arrow keys and history for input)

        say(
            "/reset forgets, /system TEXT says what to tell the model first, "
            "Ctrl-C stops an answer, Ctrl-D ends"
        )
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                write("\n")
            return 0
        except KeyboardInterrupt:  # at the prompt it only clears the line
            write("\n")
            continue
        command, _, rest = line.partition(" ")
        if line == "/reset":
            talk.turns.clear()
        elif command == "/system":
            talk.tell(rest.strip())
        elif re.fullmatch("/[a-z]+", line):
            say(f"{shown(line)} is no command: there are /reset and /system TEXT")
        elif line:
            talk.answer(line)


class Conversation:
    """Turns, and a cache that keeps what the next prompt has in common with the text before it."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.system: list[dict[str, str]] = []
        self.turns: list[dict[str, str]] = []
        self.cache = sys.modules[type(model).__module__].KVCache()
        self.cached: list[int] = []  # the ids of which the cache holds the first

    def tell(self, text: str) -> None:
        """Set the system message; none where the chat format has no place for it."""
        self.system = [{"role": "system", "content": text}] if text else []
        turn = [{"role": "user", "content": "?"}]
        try:
            has_place = not text or self.tokenizer.chat(self.system + turn) != self.tokenizer.chat(turn)
        except ValueError:
            has_place = False
        if not has_place:
            say("note: this checkpoint's chat format has no system message, it is left out")
            self.system = []

    def answer(self, question: str) -> None:
        """Stream the answer to `question`; Ctrl-C ends it early, and what was said stays said."""
        import torch

        from decoders import decoding

        turns = [*self.turns, {"role": "user", "content": question}]
        ids = self.tokenizer.chat(self.system + turns)
        common = next(
            (i for i, (a, b) in enumerate(zip(ids, self.cached, strict=False)) if a != b),
            min(len(ids), len(self.cached)),
        )
        self.cache.truncate(min(common, len(self.cache), len(ids) - 1))
        known, pieces, interrupted = len(self.cache), [], []

        def show(text: str) -> None:
            text = text if pieces else text.lstrip()
            if text:
                pieces.append(text)
                write(text)

        stream = self.tokenizer.stream(show, skip_special_tokens=True, stops=self.tokenizer.chat_stops)
        watch = Watch("", show, stream)

        def stop(*_) -> None:  # after the token that is being computed; pressed again: now, and for good
            if interrupted:
                raise KeyboardInterrupt
            interrupted.append(True)

        before = signal.signal(signal.SIGINT, stop)
        try:
            result = decoding.generate(
                self.model,
                torch.tensor([ids], device=self.args.device),
                streamer=watch,
                past_key_values=self.cache,
                stopping_criteria=[lambda ids, logits: stream.stopped or bool(interrupted)],
                **settings(self.args, self.model, self.tokenizer, len(ids)),
            )
        finally:
            signal.signal(signal.SIGINT, before)
        write("\n")
        self.cached = result[0].tolist()
        self.turns = [*turns, {"role": "assistant", "content": "".join(pieces).rstrip()}]
        say(f"({watch.report(len(ids))}; {known} of the prompt were in the cache)")


# ---- inspect -----------------------------------------------------------------------------------------------


def inspect(args: argparse.Namespace) -> int:
    from decoders import family, find, kernels, model_class, read_config, weights
    from decoders.formats.config import cache_shape

    folder = find(args.model)
    config = read_config(folder)
    model, found = weights.fitting(model_class(config), folder)
    matched = weights.match(model, found)
    layers = [m for m in model.modules() if isinstance(m, kernels.Quantized)]
    others = sum(p.numel() for p in model.parameters())
    bits = dict(model.named_buffers())
    dtype = weights.stored_dtype(folder, (t for n, t in matched.tensors.items() if n not in bits))
    facts = {
        "folder": str(folder),
        "family": family(config),
        "model": type(model).__name__,
        "parameters": others + sum(m.in_features * m.out_features for m in layers),
        "dtype": str(dtype).removeprefix("torch."),
        "memory": others * dtype.itemsize + sum(t.nbytes for t in bits.values()),
        "cache per token": 2 * math.prod(cache_shape(model.config)) * dtype.itemsize,
        "context": getattr(model, "max_positions", None) or config.get("max_position_embeddings"),
        "new": matched.new,
        "unused": matched.unused,
        "problems": matched.problems,
    }
    if layers:
        facts["quantized"] = layers[0].kind
    if args.json:
        facts["tensors"] = [
            {"name": n, "shape": list(t.shape), "file": found.origin[n][0].name, "stored": found.origin[n][1]}
            for n, t in found.items()
        ]
        write(json.dumps(facts, ensure_ascii=False) + "\n")
    else:
        write(shown(as_table(facts, found)))
    return EXIT_DIFFERENT if matched.problems else 0


def as_table(facts: dict, found: Any) -> str:
    from decoders.formats import names

    facts = {**facts, "parameters": f"{facts['parameters']:,}"}
    for key in ("memory", "cache per token"):
        facts[key] = human(facts[key])
    facts["context"] = f"{facts['context']} tokens" if facts["context"] else "-"
    facts["memory"] += " for the weights"
    lines = [f"{key:<16} {value}" for key, value in facts.items() if not isinstance(value, list)]
    lines += ["", "tensors (as stored -> parameter; layers grouped)"]
    groups: dict[tuple, list] = {}
    for name, tensor in found.items():
        file, stored = found.origin[name]
        key = (names.no_number(stored), names.no_number(name), tuple(tensor.shape), tensor.dtype)
        groups.setdefault(key, []).append((stored, name))
    for (_, _, shape, dtype), pairs in groups.items():
        stored, name = (names.grouped(column) for column in zip(*pairs, strict=True))
        arrow = "" if stored == name else f" -> {name}"
        lines.append(f"  {stored}{arrow}  {shape} {str(dtype).removeprefix('torch.')}")
    lines += [f"  not in the checkpoint, would be drawn anew: {name}" for name in facts["new"]]
    lines += [f"  not used by {facts['model']}: {name}" for name in facts["unused"]]
    lines += ["", *(f"PROBLEM {problem}" for problem in facts["problems"])] if facts["problems"] else []
    return "\n".join(lines) + "\n"


# ---- compare -----------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> int:
    from decoders import compare as proof
    from decoders.compare import checkpoints, heat, kit, ports

    cases = None if args.cases is None else args.cases.split(",")
    if args.make is not None:
        if args.first is None or args.second is not None:
            raise ValueError("--make KIT needs one family or checkpoint")
        folder = kit.make(
            args.make, args.first, cases=cases, seed=args.seed, layers=args.layers, format=args.format
        )
        say(f"{folder / 'KIT.md'} says what is in it")
        return 0
    if args.first is None or args.second is None:
        raise ValueError("compare needs a kit and a port: python -m decoders compare --help")
    try:
        if args.prompt is not None:
            report = here_and_there(args)
        elif Path(args.second).is_dir():
            report = checkpoints.apart(args.first, args.second)
        elif not (Path(args.first) / "kit.json").exists():
            raise ValueError(
                f"{args.first} is no kit: python -m decoders compare --make {args.first} FAMILY "
                "writes one; a checkpoint needs a second one, or --prompt"
            )
        else:
            with output_aside():
                report = proof.run(args.first, args.second, dtype=args.dtype, cases=cases)
    except ports.PortError as error:
        say(str(error).rstrip())
        return EXIT_UNUSABLE
    twins = isinstance(report, checkpoints.Twins)
    if args.html is not None:
        if twins:
            raise ValueError("--html is for a kit and a port")
        Path(args.html).write_text(heat.page(report))
    if args.json:
        write(json.dumps(report.as_json(), ensure_ascii=False, allow_nan=False) + "\n")
    else:
        write(shown(str(report) if twins else report.text(args.all)) + "\n")
    return 0 if report.equal else EXIT_DIFFERENT


@contextmanager
def output_aside() -> Iterator[None]:
    """What a port prints goes to standard error, from whatever language: the answer has the output alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def here_and_there(args: argparse.Namespace) -> Any:
    from decoders.compare import checkpoints

    if args.second != "transformers":
        raise ValueError(f"--prompt compares a checkpoint with transformers, not with {args.second}")
    folder, tokenizer = opened(args.first)
    ids = tokenizer.encode(standard_input() if args.prompt == "-" else args.prompt)
    if not ids:
        raise ValueError("the prompt is empty")
    return checkpoints.on_prompt(folder, ids, args.dtype or "float32", args.sequential, say)


# ---- look --------------------------------------------------------------------------------------------------


def look(args: argparse.Namespace) -> int:
    from decoders import look as looking

    looking.check_place(args.output)
    if args.other is not None and (args.with_model is not None or args.image is not None):
        raise ValueError("--with takes neither --with-model nor --image: a page shows two runs at most")
    prompt = standard_input() if args.prompt == "-" else args.prompt
    start = time.perf_counter()
    first = run_of(args, args.model, prompt)
    runs = [first]
    if args.other is not None:
        runs.append(run_of(args, args.model, args.other, first))
    elif args.with_model is not None:
        runs.append(run_of(args, args.with_model, prompt))
    content = looking.page(runs)
    file = looking.write(args.output, content)
    tokens = " and ".join(str(run.ids.shape[-1]) for run in runs)
    say(
        f"{file}: {tokens} tokens, {human(len(content.encode(errors='replace')))}, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return 0


def run_of(args: argparse.Namespace, path_or_id: str, prompt: str, before: Any = None) -> Any:
    """What `look.page` shows of a prompt in a model: it, and what the model continues it with. `before` is a
    run of the same model."""
    import torch

    from decoders import decoding, family, find, fuyu, read_config, tokenize
    from decoders import look as looking

    folder = find(path_or_id)
    family(read_config(folder))
    tokenizer, sight = None, None
    try:
        tokenizer = (before and before.tokenizer) or tokenize.load(folder)
    except (OSError, ValueError) as error:
        if args.image is not None or args.chat:
            raise
        ids = typed_ids(prompt, path_or_id, error)
    else:
        if args.image is not None:
            sight = Sight(folder, tokenizer, prompt, argparse.Namespace(**vars(args), draw=None))
            ids = sight.inputs["input_ids"][0].tolist()
        else:
            message = [{"role": "user", "content": prompt}]
            ids = tokenizer.chat(message) if args.chat else tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty: there is no token to look at")
    looking.check_length(len(ids) + args.max_new_tokens, args.last)
    model = before.model if before else loaded(folder, args)
    pictures = sight.pictures if sight else {}
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"token ids are 0 to {model.config.vocab_size - 1} here, not {max(ids)}")
    asked = settings(args, model, tokenizer, len(ids))
    sequences = decoding.generate(model, torch.tensor([ids], device=args.device), **asked, **pictures)
    name = folder.resolve().name if Path(path_or_id).exists() else path_or_id
    picture, spelled = None, {}
    if sight:
        spelled = {sight.processor.id_of(piece): tag for tag, piece in fuyu.TAGS.items()}
        spelled[sight.processor.id_of(fuyu.ANSWER)] = "<answer>"
        found = sight.located(sequences[0, len(ids) :].tolist())
        picture = looking.seen_picture(
            sight.processor.image_processor,
            sight.picture,
            sequences[0].tolist(),
            model.config.image_token_id,
            found.places,
        )
    return looking.Run(
        model, sequences, tokenizer, len(ids), name, prompt, args.last, pictures, picture, spelled
    )


def typed_ids(prompt: str, folder: str, error: Exception) -> list[int]:
    """Of a folder without a tokenizer: ids, and they are shown as they are."""
    words = prompt.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f'{folder} has no usable tokenizer ({told(error)}): give ids, as in "12 5 7"')
    say(f"note: no tokenizer is read ({told(error)}), so tokens are shown as ids")
    return [int(word) for word in words]


# ---- main --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars are for terminals
    try:
        run = {"generate": generate, "chat": chat, "inspect": inspect, "compare": compare, "look": look}[
            args.command
        ]
        status = run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        say("\ninterrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe had enough: not our error, and nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        say(f"error: {told(error)}")
        return EXIT_UNUSABLE


if __name__ == "__main__":
    sys.exit(main())
