"""A checkpoint for a command: folder, tokenizer, model, and the settings that the options ask for."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from decoders import FAMILIES, family, find, kernels, model_class, parallel, read_config, tokenize, weights

from .output import print_note


def open_checkpoint(path_or_id: str) -> tuple[Path, Any]:
    """The folder, of a family that is served here, and its tokenizer."""
    folder = find(path_or_id)
    family(read_config(folder))
    return folder, tokenize.load(folder)


def load_model(folder: Path, args: argparse.Namespace, with_adapters: bool = True) -> Any:
    """The model that generates text, with a bar on a terminal if it takes more than a second; with what
    `--adapter` says."""
    device = usable_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    kind = family(read_config(folder))
    text_class = model_class({"model_type": kind, "architectures": [FAMILIES[kind][1]]})
    set_seed(args.seed)
    adapter = [weighted(text) for text in args.adapter] if args.adapter and with_adapters else None
    if mesh := getattr(args, "mesh", None):
        return parallel.load(text_class, folder, mesh, dtype=dtype, adapter=adapter)
    model = weights.load(
        text_class,
        folder,
        dtype=dtype,
        device=device,
        quantize=args.quantize,
        packed=args.packed and device.type == "cpu",
        prefill=args.prefill,
        progress=sys.stderr.isatty(),
        adapter=adapter,
    )
    if args.prefill and with_adapters and not has_4_bits(model):
        print_note(f"note: --prefill {args.prefill} changes nothing: no layer of this model has 4 bits")
    return kernels.prepare(model, cache=args.cache)


def has_4_bits(model: Any) -> bool:
    """Whether a layer does."""
    return any(isinstance(m, kernels.Quantized) and m.kind == "int4" for m in model.modules())


def weighted(text: str) -> str | tuple[str, float]:
    """FOLDER, or FOLDER=WEIGHT. A folder may have a = in its name."""
    folder, _, weight = text.rpartition("=")
    try:
        return (folder, float(weight)) if folder else text
    except ValueError:
        return text


def set_seed(seed: int | None) -> None:
    if seed is None:
        return
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"--seed must be from -2**63 to 2**64 - 1, not {seed}")
    torch.manual_seed(seed)


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} is not usable here: {str(error).splitlines()[0]}") from None
    return device


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Ids of a prompt as it is, or as a user's message in the model's chat format."""
    if chat:
        return tokenizer.chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt)


def settings(
    args: argparse.Namespace, model: Any, tokenizer: Any, prompt_tokens: int, is_chat: bool
) -> dict[str, Any]:
    """The arguments of `decoding.generate` that the options ask for, after a prompt of so many tokens."""
    note_context(model, prompt_tokens)
    filters = (args.temperature, args.top_k, args.top_p, getattr(args, "min_p", None))
    samples = any(option is not None for option in filters)
    return {
        "max_new_tokens": new_tokens(args.max_new_tokens, model, prompt_tokens),
        "do_sample": samples and args.temperature != 0,
        "temperature": args.temperature or 1.0,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "eos_token_id": stop_ids(model, tokenizer, is_chat),
    }


def new_tokens(asked: int, model: Any, prompt_tokens: int) -> int:
    """As many as asked for, or as many as fit, with a note. The last one needs no position."""
    limit = getattr(model, "max_positions", None)
    if limit is None:
        return asked
    fitting = limit - prompt_tokens + 1
    if not 0 < fitting < asked:
        return asked
    print_note(f"note: {fitting} new tokens fit after a prompt of {prompt_tokens} ({limit} positions)")
    return fitting


def context_length(model: Any) -> int:
    """Tokens of the longest text that the model was made for: as many as it has learned positions, which is
    all that it takes; or as it was trained with, which rotary positions can exceed."""
    config = model.config
    if config.model_type == "openai-gpt":
        return config.n_positions
    scaling = getattr(config, "rope_scaling", None) or {}
    factor = scaling["factor"] if scaling.get("type") in ("linear", "dynamic") else 1  # longrope's is in it
    return round(config.max_position_embeddings * factor)


def note_context(model: Any, tokens: int, noted: int = 0) -> None:
    """A note where a text of so many tokens is longer than what the model was made for, if one of `noted`
    tokens was not. Learned positions are another matter: there is an error where a prompt has too many."""
    limit = context_length(model)
    if noted <= limit < tokens and getattr(model, "max_positions", None) is None:
        print_note(
            f"note: {tokens:,} tokens are more than the {limit:,} of this model's context: "
            "what it writes beyond them may make no sense"
        )


def stop_ids(model: Any, tokenizer: Any, is_chat: bool = False) -> list[int] | None:
    """The checkpoint's own, or the tokenizer's where no config names any, as with phi-1 and phi-1.5; in a
    conversation also what ends a turn."""
    own = model.special_ids("checkpoint", None)[0].tolist()
    if is_chat:
        own = list(dict.fromkeys([*own, *tokenizer.chat_ends()[0]]))
    if own or tokenizer is None or tokenizer.eos_token_id is None:
        return own or None
    return [tokenizer.eos_token_id]
