"""`look MODEL PROMPT -o PAGE`: a page that shows a model think."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from decoders import decoding, family, find, fuyu, look, read_config, tokenize
from decoders.formats import check_writable

from .images import ImageInput
from .loading import load_model, prompt_ids, settings
from .output import check_page, human_bytes, one_line, print_note, standard_input


def run(args: argparse.Namespace) -> int:
    check_writable(args.output)
    check_page(args.output)
    if args.other is not None and (args.with_model is not None or args.image is not None):
        raise ValueError("--with takes neither --with-model nor --image: a page shows two runs at most")
    prompt = standard_input() if args.prompt == "-" else args.prompt
    start = time.perf_counter()
    runs = [run_of(args, args.model, prompt)]
    if args.other is not None:
        runs.append(run_of(args, args.model, args.other, runs[0]))
    elif args.with_model is not None:
        runs.append(run_of(args, args.with_model, prompt))
    content = look.page(runs)
    file = look.write(args.output, content)
    tokens = " and ".join(str(run.ids.shape[-1]) for run in runs)
    size, seconds = human_bytes(len(content.encode(errors="replace"))), time.perf_counter() - start
    print_note(f"{file}: {tokens} tokens, {size}, {seconds:.1f} s")
    return 0


def run_of(args: argparse.Namespace, path_or_id: str, prompt: str, previous: Any = None) -> Any:
    """What `look.page` shows of a prompt in a model: it, and what the model continues it with. `previous` is
    a run of the same model."""
    folder = find(path_or_id)
    family(read_config(folder))
    ids, tokenizer, image = read_prompt(args, path_or_id, folder, prompt, previous)
    if not ids:
        raise ValueError("the prompt is empty: there is no token to look at")
    look.check_length(len(ids) + args.max_new_tokens, args.last)
    model = previous.model if previous else load_model(folder, args)
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"token ids are 0 to {model.config.vocab_size - 1} here, not {max(ids)}")
    patches = image.patches if image else {}
    sequences: Any = decoding.generate(
        model,
        torch.tensor([ids], device=args.device),
        **settings(args, model, tokenizer, len(ids), args.chat),
        **patches,
    )
    picture, names = seen(image, sequences, len(ids), model) if image else (None, {})
    name = folder.resolve().name if Path(path_or_id).exists() else path_or_id
    return look.Run(model, sequences, tokenizer, len(ids), name, prompt, args.last, patches, picture, names)


def read_prompt(
    args: argparse.Namespace, path_or_id: str, folder: Path, prompt: str, previous: Any
) -> tuple[list[int], Any, ImageInput | None]:
    """(ids, tokenizer, picture) of a prompt."""
    try:
        tokenizer = (previous and previous.tokenizer) or tokenize.load(folder)
    except (OSError, ValueError) as error:
        if args.image is not None or args.chat:
            raise
        return typed_ids(prompt, path_or_id, error), None, None
    if args.image is not None:
        image = ImageInput(folder, tokenizer, prompt, args)
        return image.input_ids, tokenizer, image
    return prompt_ids(tokenizer, prompt, args.chat), tokenizer, None


def typed_ids(prompt: str, folder: str, error: Exception) -> list[int]:
    """Of a folder without a tokenizer: ids, and they are shown as they are."""
    words = prompt.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f'{folder} has no usable tokenizer ({one_line(error)}): give ids, as in "12 5 7"')
    print_note(f"note: no tokenizer is read ({one_line(error)}), so tokens are shown as ids")
    return [int(word) for word in words]


def seen(image: ImageInput, sequences: torch.Tensor, n: int, model: Any) -> tuple[Any, dict[int, str]]:
    """The picture as the model saw it with the places of its answer, and names for Fuyu's control tokens."""
    processor = image.processor
    names = {processor.id_of(piece): tag for tag, piece in fuyu.TAGS.items()}
    names[processor.id_of(fuyu.ANSWER)] = "<answer>"
    answer = image.located(sequences[0, n:].tolist())
    picture = look.seen_picture(
        processor.image_processor,
        image.picture,
        sequences[0].tolist(),
        model.config.image_token_id,
        answer.places,
    )
    return picture, names
