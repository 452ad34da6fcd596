"""Train any of the six small, on your own text: from nothing or from a checkpoint, whole or by LoRA.

    python -m examples.train phi --text mine.txt --minutes 5                  # into out/phi
    python -m examples.train gpt_neo --text novels/ --steps 2000 --out out/novels
    python -m examples.train phi3 --text mine.txt --start checkpoints/tiny-phi3 --lora 8 --out out/mine
    torchrun --nproc-per-node 2 -m examples.train phi --text mine.txt         # data parallel

OUT is a folder in the hub's layout, which `python -m decoders generate` and Transformers read, with a loss
curve and `training.pt`, from which the same command goes on after Ctrl-C or kill -9. Needs `.[train]`.
The default size is for a first try: of a million letters of prose, five minutes on two cores make a model
that writes words and phrases of the text, and no sense; GPT-1 takes longer. With more time and text:
--width 384 --layers 6 --heads 6 --context 256 --vocab 8000 --learning-rate 1e-3.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from decoders import FAMILIES, family, find, formats, model_class, read_config, tokenize, weights
from examples import resume
from examples.curve import draw
from examples.lora import add_lora, merged
from examples.loss import Loss
from examples.texts import Batch, crops, read_texts, split
from examples.vocabularies import byte_level_bpe

# ---- A step ----


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW moves every weight by about the rate, so that Fuyu's sums of 2,700 pixels would move 20 times as
    far as others: they have a twentieth of it."""
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    seeing = [p for name, p in learnt.items() if "vision_" in name]
    others = [p for name, p in learnt.items() if "vision_" not in name]
    groups = [{"params": others, "share": 1.0}, {"params": seeing, "share": 0.05}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def train_step(
    loss_of: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    progress: float,
    warmup: float = 0.05,
    autocast: bool = False,
) -> float:
    """One step over some batches; their mean loss. Over `progress`, 0 to 1: warm-up, cosine to a tenth."""
    rate = learning_rate * min((progress + 1e-3) / warmup, 0.55 + 0.45 * math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
    batches, device, total = list(batches), next(loss_of.parameters()).device, 0.0
    for ids, labels, inputs in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(ids.to(device), labels.to(device), **inputs) / len(batches)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(loss_of.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


# ---- The model ----


def new_model(kind: str, tokenizer: Any, a: argparse.Namespace) -> nn.Module:
    """Of the asked width, layers and heads; all other fields are the documented defaults."""
    kinds = [[["global", "local"], a.layers // 2], [["global"], a.layers % 2]]  # GPT-Neo's, in turn
    end, no_dropout = tokenizer.eos_token_id, dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    sizes |= {"hidden_size": a.width, "intermediate_size": 4 * a.width, "attention_types": kinds}
    sizes |= dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), a.layers)
    sizes |= dict.fromkeys(("num_attention_heads", "num_heads", "n_head"), a.heads)
    sizes |= dict.fromkeys(("max_position_embeddings", "n_positions"), a.context) | {"n_embd": a.width}
    cls = model_class({"model_type": kind})
    return cls(cls.config_class.from_dict({**sizes, **no_dropout, "text_config": sizes}))


def begin(a: argparse.Namespace, texts: list[str]) -> tuple[Any, nn.Module]:
    """Tokenizer and model: of --start, or new ones for this text. The first process writes the tokenizer."""
    torch.manual_seed(a.seed)
    if a.start and (kind := family(read_config(find(a.start)))) != a.family:
        raise ValueError(f"--start {a.start} is a model of {kind}, not of {a.family}")
    if not a.start and a.rank == 0 and not (a.out / "training.pt").exists():
        byte_level_bpe(texts, a.out, a.vocab)
        (a.out / "config.json").write_text(f'{{"model_type": "{a.family}"}}')  # until `save`
    if a.world > 1:
        dist.barrier()
    tokenizer = tokenize.load(a.start or a.out)
    if a.start:
        model = weights.load(model_class(read_config(find(a.start))), a.start, dtype=torch.float32)
        model.requires_grad_(True)
    else:
        model = new_model(a.family, tokenizer, a)
        model.generation_config = {"eos_token_id": tokenizer.eos_token_id}
    if a.lora:
        add_lora(model, a.lora)
    return tokenizer, model


# ---- The training ----


def main() -> None:
    a = arguments()
    resume.check_arguments(a)
    if a.world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    texts, state = read_texts(a.text), resume.saved_training(a)
    a.out.mkdir(parents=True, exist_ok=True)
    tokenizer, model = begin(a, texts)
    resume.prompt_ids(a, tokenizer)
    learnt, held_out = split(texts, tokenizer, a.context)
    module = Loss(model.to("cuda" if torch.cuda.is_available() else "cpu")).train()
    optimizer, losses = optimizer_of(model), []  # (step, seconds, loss)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    loss_of = nn.parallel.DistributedDataParallel(module) if a.world > 1 else module
    loss_of = torch.compile(loss_of) if a.compile else loss_of
    seed = a.seed + a.rank + 1000 * len(losses)  # a training that goes on sees other crops
    batches = crops(learnt, a.batch_size, a.context, torch.Generator().manual_seed(seed))
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(learnt):,} tokens"
    say(a, f"{size}, from step {len(losses)}: a report each minute, and at the end or Ctrl-C")
    save = partial(report, a, module, tokenizer, optimizer, losses, held_out)
    with resume.interrupts(lambda: setattr(a, "interrupted", True)):
        train(a, loss_of, batches, optimizer, losses, save)
    if a.interrupted:
        raise KeyboardInterrupt
    command = f"python -m decoders generate {a.out} {a.prompt!r} --temperature 0.8 --top-k 50"
    say(a, f"{a.out} is a checkpoint: {command}")


def train(
    a: argparse.Namespace,
    loss_of: nn.Module,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    losses: list,
    save: Callable[[], None],
) -> None:
    """Until the steps or minutes are over; `losses` grows, and is saved each minute. ValueError where the
    loss is no number any more."""
    first, saved = len(losses), time.monotonic()
    start = saved - (losses[-1][1] if losses else 0)
    while (share := progress(a, len(losses), time.monotonic() - start)) < 1:
        group = itertools.islice(batches, a.accumulate)
        loss = train_step(loss_of, group, optimizer, a.learning_rate, share, autocast=a.autocast)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {len(losses) + 1} is {loss}: try a smaller --learning-rate")
        losses.append((len(losses) + 1, time.monotonic() - start, loss))
        if len(losses) == first + 5:
            say(a, f"{(losses[-1][1] - losses[-5][1]) / 4:.2f} seconds a step")
        if a.rank == 0 and time.monotonic() - saved > 60:
            save()
            saved = time.monotonic()
    if len(losses) == first and not a.interrupted:
        say(a, "that is all that was asked for: to go on, give more --minutes or --steps")
    elif a.rank == 0 and losses:
        save()


def say(a: argparse.Namespace, message: str) -> None:
    """To standard error, once."""
    if a.rank == 0:
        print(message, file=sys.stderr)


def progress(a: argparse.Namespace, steps: int, seconds: float) -> float:
    """From 0 to 1; the first process decides, so that all stop together."""
    share = torch.tensor(steps / a.steps if a.steps else seconds / 60 / a.minutes)
    share = torch.ones(()) if a.interrupted else share
    if a.world > 1:
        dist.broadcast(share, 0)
    return share.item()


def report(
    a: argparse.Namespace, module: Loss, tokenizer: Any, optimizer: Any, losses: list, held_out: Tensor
) -> None:
    """Held-out loss and a sample to standard error; folder, curve and state, each replaced as a whole."""
    model, device = module.model.eval(), module.head.weight.device
    rows = held_out.to(device).unfold(0, a.context, a.context)
    with torch.no_grad():
        held = sum(module(row[None], row[None]).item() for row in rows) / len(rows)
    ids = torch.tensor([resume.prompt_ids(a, tokenizer)], device=device)
    new_tokens = min(60, a.context - ids.shape[1])
    new = model.generate(ids, max_new_tokens=new_tokens, do_sample=True, temperature=0.8, top_k=50)
    text = tokenizer.decode(new[0].tolist())
    print(f"step {len(losses)}: loss {losses[-1][2]:.3f}, held out {held:.3f}: {text!r}", file=sys.stderr)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    resume.save_training(a.out / "training.pt", {**state, "settings": resume.settings_of(a)})
    weights.save(merged(model), a.out, tokenizer)
    lines = [",".join(map(str, row)) for row in [("step", "seconds", "loss"), *losses]]
    formats.write_file(a.out / "loss.csv", "\n".join(lines) + "\n")
    draw([loss for _, _, loss in losses], held, a.out / "loss.png")
    module.train()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python -m examples.train FAMILY --text FILE [options; --help lists them]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", choices=FAMILIES, type=lambda s: {"openai_gpt": "openai-gpt"}.get(s, s))
    parser.add_argument("--text", type=Path, required=True, help="a file, or a folder of .txt and .md files")
    parser.add_argument("--out", type=Path, help="default: out/FAMILY")
    parser.add_argument("--start", type=Path, help="a checkpoint folder to begin with, and its tokenizer")
    parser.add_argument("--minutes", type=float, default=5.0, help="of all tries together (default: 5)")
    parser.add_argument("--steps", type=int, default=0, help="so many, whatever time they take")
    numbers = {"lora": 0, "width": 128, "layers": 4, "heads": 4, "context": 128, "vocab": 2000}
    numbers |= {"batch-size": 16, "accumulate": 1, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="default: 0.003, of GPT-1 and --start 0.001")
    parser.add_argument("--prompt", default="The", help="of the samples")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16")
    a = parser.parse_args()
    a.out = a.out or Path("out") / a.family
    if a.learning_rate is None:  # post-norm stays at the frequencies of single tokens at more
        a.learning_rate = 1e-3 if a.start or a.family == "openai-gpt" else 3e-3
    a.interrupted = False
    a.rank, a.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return a


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("interrupted: the same command goes on from the last report", file=sys.stderr) or 130)
