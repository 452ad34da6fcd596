"""`generate MODEL PROMPT`: continue a prompt, answer a question, describe a picture."""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from decoders import decoding, kernels, parallel
from decoders.formats import read_text

from .images import ImageInput
from .loading import load_model, note_context, open_checkpoint, prompt_ids, settings
from .output import Progress, human_bytes, one_line, peak_memory, print_note, print_result, standard_input


def run(args: argparse.Namespace) -> int:
    if args.compile and args.cache:
        message = "a compiled step keeps keys and values in the model's dtype"
        raise ValueError(f"--compile and --cache exclude each other: {message}")
    if not args.tensor_parallel:
        return generate(args)
    for name in ("quantize", "cache", "prefill"):
        if getattr(args, name):
            raise ValueError(f"--tensor-parallel and --{name} exclude each other")
    rank = os.environ.get("RANK", "0")
    try:
        with parallel.process_mesh(args.device) as args.mesh:
            if args.prompt == "-":
                args.prompt = parallel.broadcast(standard_input() if rank == "0" else None)
            args.draw = args.draw if rank == "0" else None
            return generate(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"--tensor-parallel, process {rank}: {one_line(error)}") from None


class Request:
    """What was asked: prompt, ids, picture, model, and the arguments of `decoding.generate`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        folder, self.tokenizer = open_checkpoint(args.model)
        self.prompt = standard_input() if args.prompt == "-" else args.prompt
        self.image: ImageInput | None = None
        if args.image is not None or args.draw is not None:
            self.image = ImageInput(folder, self.tokenizer, self.prompt, args)
        if self.image:
            self.ids = self.image.input_ids
        else:
            self.ids = prompt_ids(self.tokenizer, self.prompt, args.chat)
        if not self.ids:
            raise ValueError("the prompt is empty: this model needs at least one token to continue")
        start = time.perf_counter()
        self.model = load_model(folder, args)
        self.settings = settings(args, self.model, self.tokenizer, len(self.ids), args.chat)
        self.settings |= strategy(args, self.tokenizer, self.ids, self.settings["eos_token_id"])
        self.seconds_to_load = time.perf_counter() - start
        self.is_answer = args.chat or self.image is not None  # then only the answer is shown

    def generate(self, **more: Any) -> Any:
        return decoding.generate(
            self.model,
            torch.tensor([self.ids], device=self.args.device),
            return_dict_in_generate=True,
            **self.settings,
            **(self.image.patches if self.image else {}),
            **more,
        )

    def scores(self, sequences: torch.Tensor) -> list[list[float]]:
        """Log-probabilities of the new tokens of each sequence."""
        patches = self.image.patches_of(len(sequences)) if self.image else {}
        return decoding.score(self.model, sequences, **patches)[:, len(self.ids) - 1 :].tolist()


def generate(args: argparse.Namespace) -> int:
    request = Request(args)
    if args.num_beams > 1 or args.num_return_sequences > 1:
        return generate_several(request)
    return generate_one(request)


def generate_one(request: Request) -> int:
    """One text, streamed."""
    args, tokenizer, image = request.args, request.tokenizer, request.image
    pieces: list[str] = []

    def show(text: str) -> None:
        if request.is_answer and not any(pieces):  # an answer begins with a space
            text = text.lstrip()
        pieces.append(text)
        if not args.json:
            print_result(text)

    stops = tokenizer.chat_ends()[1] if args.chat else ()
    stream = tokenizer.stream(show, skip_special_tokens=True, stops=stops)
    if image:
        image.show = show
    progress = Progress("" if request.is_answer else request.prompt, show, image or stream)
    result = request.generate(streamer=progress, stopping_criteria=[lambda ids, logits: stream.stopped])
    ids = request.ids
    note_context(request.model, result.sequences.shape[1], len(ids))
    answer = {
        "prompt": request.prompt,
        "text": "".join(pieces[1:]),
        "prompt_ids": ids,
        "ids": result.sequences[0, len(ids) :].tolist(),
    }
    if not args.json:
        print_result("\n")
    if image:
        answer |= image.answer()
    if args.json:
        answer["scores"] = request.scores(result.sequences)[0]
        print_result(json.dumps(answer, ensure_ascii=False) + "\n")
    drafted = ""
    if result.stats:
        drafted = f", {result.stats['accepted']} of {result.stats['drafted']} drafted tokens accepted"
    loaded, memory = f"loaded in {request.seconds_to_load:.2f} s", human_bytes(peak_memory())
    print_note(f"{progress.report(len(ids))}{drafted}, {operators(args)}, {loaded}, peak memory {memory}")
    return 0


def generate_several(request: Request) -> int:
    """Texts that are only known in the end: those of beams, or more than one. An empty line between them."""
    args, ids = request.args, request.ids
    start = time.perf_counter()
    result = request.generate()
    seconds = time.perf_counter() - start
    note_context(request.model, result.sequences.shape[1], len(ids))
    rows = [
        until_stop(row, request.settings["eos_token_id"]) for row in result.sequences[:, len(ids) :].tolist()
    ]
    texts = [text_of(request, row) for row in rows]
    if args.json:
        scores = request.scores(result.sequences)
        answer = {
            "prompt": request.prompt,
            "texts": texts,
            "prompt_ids": ids,
            "ids": rows,
            "scores": [row[: len(own)] for row, own in zip(scores, rows, strict=True)],
        }
        if result.sequences_scores is not None:
            answer["beam_scores"] = result.sequences_scores.tolist()
        print_result(json.dumps(answer, ensure_ascii=False) + "\n")
    else:
        shown = [text.strip() if request.is_answer else request.prompt + text for text in texts]
        print_result("\n\n".join(shown) + "\n")
    new, memory = sum(map(len, rows)), human_bytes(peak_memory())
    tokens = f"{len(ids)} prompt + {new} new tokens in {len(rows)} text{'s' * (len(rows) != 1)}"
    print_note(f"{tokens}, {seconds:.2f} s, {operators(args)}, peak memory {memory}")
    return 0


def operators(args: argparse.Namespace) -> str:
    """What computed: kernels for which instructions, or PyTorch's operators."""
    on_cpu = torch.device(args.device).type == "cpu"
    return kernels.operators() if on_cpu else f"PyTorch's operators on {args.device}"


def until_stop(row: list[int], eos: list[int] | None) -> list[int]:
    """New ids up to the first stop id, padding left out."""
    ends = [i + 1 for i, id in enumerate(row) if id in (eos or ())]
    return row[: ends[0]] if ends else row


def text_of(request: Request, row: list[int]) -> str:
    if request.image:
        return request.image.located(row).text
    decode = request.tokenizer.decode
    return decode([*request.ids, *row], True).removeprefix(decode(request.ids, True))


# ---- Strategies --------------------------------------------------------------------------------------------


def strategy(args: argparse.Namespace, tokenizer: Any, ids: list[int], eos: list[int] | None) -> dict:
    """The arguments of `decoding.generate` for the options of `add_strategies`."""
    arguments: dict[str, Any] = {
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
        arguments |= {"stop_strings": args.stop, "tokenizer": tokenizer}
    if args.negative_prompt is not None:
        negative = prompt_ids(tokenizer, args.negative_prompt, args.chat)
        arguments["negative_prompt_ids"] = torch.tensor([negative], device=args.device)
    if args.assistant is not None:
        arguments["assistant_model"] = load_assistant(args, tokenizer)
    if args.choices is not None:
        lines = [line for line in read_text(Path(args.choices)).splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--choices {args.choices} has no lines to choose from")
        arguments["prefix_allowed_tokens_fn"] = one_of(lines, tokenizer, ids, eos)
    return arguments


def load_assistant(args: argparse.Namespace, tokenizer: Any) -> Any:
    """The model that drafts. ValueError if its vocabulary is another."""
    folder, other = open_checkpoint(args.assistant)
    sample = "Once upon a time, 1 2 3."
    if other.encode(sample) != tokenizer.encode(sample):
        raise ValueError(f"--assistant {args.assistant} has another vocabulary than the model")
    return load_model(folder, args, with_adapters=False)


def one_of(lines: list[str], tokenizer: Any, ids: list[int], eos: list[int] | None) -> Callable:
    """Which ids may follow, after a prompt `ids`, so that the text becomes one of `lines`; then a stop id."""
    if not eos:
        raise ValueError("--choices: this checkpoint has no token that ends a text")
    encoded = [(*tokenizer.encode(line, add_special_tokens=False), eos[0]) for line in lines]

    def allowed(row: int, text: Any) -> list[int]:
        so_far = tuple(text[len(ids) :].tolist())
        n = len(so_far)
        following = {line[n] for line in encoded if line[:n] == so_far and len(line) > n}
        return sorted(following) or eos[:1]

    return allowed
