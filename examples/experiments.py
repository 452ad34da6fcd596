"""Questions about the six models, each answered in seconds on a CPU by the tiny checkpoints.

    python -m examples.experiments                    # what there is
    python -m examples.experiments neo-scale          # one of them; several names, or "all"

Each takes one step of `compare/formula.py`, the models as named steps, puts another in its place, and
looks at what that does to texts that the checkpoint has not seen: the loss in nats a token, and the entropy
of its attention in bits. docs/reading/ says where in the files these steps are.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from decoders import fuyu, gpt_neo, look, model_class, phi, read_config, tokenize, weights
from decoders.compare.arithmetic import gelu_erf, gelu_tanh
from decoders.compare.formula import Formula
from decoders.look import traces
from examples.train_tiny import HELD_OUT_SEED, RECIPES, plain_rows

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
TEXTS = 16  # of every measurement
PROMPT = "Once upon a time there was a fox. The fox"
EXPERIMENTS: dict[str, Callable[[], None]] = {}
Change = Callable[[Formula], Any]  # puts another step in the place of one


def experiment(name: str) -> Callable:
    """The docstring is the question."""

    def take(function: Callable[[], None]) -> Callable[[], None]:
        EXPERIMENTS[name] = function
        return function

    return take


# ---- Measuring ---------------------------------------------------------------------------------------------


@cache
def checkpoint(name: str) -> tuple[torch.nn.Module, tokenize.Tokenizer]:
    """In float64, so that the last digit told is the same on every machine."""
    folder = CHECKPOINTS / f"tiny-{name}"
    return weights.load(model_class(read_config(folder)), folder, dtype=torch.float64), tokenize.load(folder)


@cache
def held_out(name: str) -> dict[str, torch.Tensor]:
    """Texts that no training has seen, as inputs of the formula."""
    recipe, tokenizer = RECIPES[name.replace("-", "_")], checkpoint(name)[1]
    rows = (recipe.rows or plain_rows)(tokenizer, list(islice(recipe.texts(HELD_OUT_SEED), TEXTS)))
    found = {"input_ids": rows.ids, "labels": rows.labels}
    if rows.inputs:
        patches, places = (rows.inputs[key] for key in ("image_patches", "image_patches_indices"))
        found["image_patches"] = pad_sequence([one.flatten(0, -2) for one in patches], batch_first=True)
        found["image_patches_indices"] = F.pad(places, (0, rows.ids.shape[1] - places.shape[1]), value=-1)
    return found


def nothing(f: Formula) -> None:
    pass


@torch.no_grad()
def measured(
    name: str, change: Change = nothing, hear: Callable | None = None, **inputs: torch.Tensor
) -> tuple[float, float]:
    """(loss in nats a token, mean entropy of attention in bits) of the changed model on texts never seen."""
    model, given = checkpoint(name)[0], {**held_out(name), **inputs}
    real = F.pad(given["labels"][:, 1:] != -100, (0, 1))[:, None]  # queries whose next token counts
    entropies = []

    def note(stage: str, value: torch.Tensor) -> torch.Tensor:
        if stage.endswith(".weights"):
            bits = -(value * value.clamp(min=1e-300).log2()).sum(-1)
            entropies.append((bits * real).sum() / real.sum() / value.shape[1])
        new = hear(stage, value) if hear else None
        return value if new is None else new

    formula = Formula(model.config, model.state_dict(), note=note)
    change(formula)
    return formula.forward(given).item(), torch.stack(entropies).mean().item()


def table(rows: Iterable[tuple], *heads: str) -> None:
    """Columns as wide as they need; numbers to the right."""
    rows = [tuple(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = [cell.ljust(widths[0]) if not i else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        print("  ".join(cells).rstrip())


def compare(name: str, changes: dict[str, Change]) -> None:
    rows = [("as it is", *measured(name))]
    rows += [(label, *measured(name, change)) for label, change in changes.items()]
    table(rows, f"tiny-{name}", "loss", "entropy")


# ---- GPT-Neo -----------------------------------------------------------------------------------------------


@experiment("neo-scale")
def neo_scale() -> None:
    """GPT-Neo leaves 1/sqrt(D) away: what happens to its attention when it is put back?"""
    compare(
        "gpt-neo",
        {
            "times 1/sqrt(D)": lambda f: setattr(f, "scale", f.D**-0.5),
            "times sqrt(D)": lambda f: setattr(f, "scale", f.D**0.5),
        },
    )


@experiment("neo-window")
def neo_window() -> None:
    """Its local layers see 32 tokens here: how many do they need?"""

    def seeing(n: int | None) -> Change:
        return lambda f: setattr(f, "windows", [None if w is None else n for w in f.windows])

    compare("gpt-neo", {**{f"{n} tokens": seeing(n) for n in (16, 8, 4, 2, 1)}, "all tokens": seeing(None)})


# ---- OpenAI GPT --------------------------------------------------------------------------------------------


@experiment("gpt1-sums")
def gpt1_sums() -> None:
    """GPT-1 norms each sum, the others only what a layer reads: how large do the sums grow?"""
    names = ("openai-gpt", "gpt-neo", "phi", "phi3", "persimmon")
    columns = []
    for name in names:
        model, tokenizer = checkpoint(name)
        found = traces.trace(model, tokenizer.encode(PROMPT), only=["embeddings", "out"])
        columns.append([value.square().mean().sqrt().item() for value in found.values()])
    labels = ["embeddings", *(f"layer {i}" for i in range(len(columns[0]) - 1))]
    table(zip(labels, *columns, strict=True), "size of the sum", *names)


@experiment("gpt1-norms")
def gpt1_norms() -> None:
    """What if GPT-1's norms stood in front, where all later models have them?"""
    compare("openai-gpt", {"norms in front": one_after_the_other})


def one_after_the_other(f: Formula) -> None:
    """The block of GPT-Neo, Phi-3 and Persimmon. Phi's two norms are one."""

    def layer(x: torch.Tensor, i: int, attend: Callable) -> torch.Tensor:
        x = x + attend(f.normed(x, "norm_1", i), i)
        return x + f.mlp(f.normed(x, "norm_2", i), i)

    f.layer = layer


# ---- Phi ---------------------------------------------------------------------------------------------------


@experiment("phi-parallel")
def phi_parallel() -> None:
    """Phi's attention and MLP read the same: what if the MLP stood behind the attention?"""
    compare("phi", {"one after the other": one_after_the_other})


@experiment("phi-rotary")
def phi_rotary() -> None:
    """Half of each head is rotated: what if all of it were, or none?"""

    def none(f: Formula) -> None:
        f.rotate = lambda x, cos, sin: x

    def other(f: Formula) -> None:
        own = f.rotate
        f.rotate = lambda x, cos, sin: own(x.flip(-1), cos, sin).flip(-1)

    compare("phi", {"all of it": lambda f: setattr(f, "R", f.D), "none of it": none, "the other half": other})


# ---- Phi-3 -------------------------------------------------------------------------------------------------


@experiment("phi3-gate")
def phi3_gate() -> None:
    """Gate and up come out of one matrix: what if they are taken for each other?"""

    def swapped(f: Formula) -> None:
        own = f.apply_act
        f.apply_act = lambda x: own(torch.cat(x.chunk(2, -1)[::-1], -1))

    compare("phi3", {"[up | gate]": swapped})


@experiment("phi3-groups")
def phi3_groups() -> None:
    """Two heads share keys and values: which two? Neighbours, not every second one."""

    def second(f: Formula) -> None:
        f.repeat_kv = lambda x: x.repeat(1, f.H // f.K, 1, 1)

    def first(f: Formula) -> None:
        f.repeat_kv = lambda x: x[:, :1].expand(-1, f.H, -1, -1)

    compare("phi3", {"every second one": second, "all share the first": first})


# ---- Persimmon ---------------------------------------------------------------------------------------------


@experiment("persimmon-norms")
def persimmon_norms() -> None:
    """Each head's q and k are normed: what does attention look like without?"""

    def without(f: Formula) -> None:
        f.q_norm = f.k_norm = lambda x: x

    compare("persimmon", {"without them": without})


@experiment("persimmon-relu2")
def persimmon_relu2() -> None:
    """Squared ReLU leaves most of the MLP at 0: how much? And were it not squared, or a GELU?"""
    zeros: dict[str, float] = {}

    def count(stage: str, value: torch.Tensor) -> None:
        if stage.endswith("mlp_act"):
            zeros[stage] = (value == 0).double().mean().item()

    measured("persimmon", hear=count)
    rows = [(f"layer {i}", share) for i, share in enumerate(zeros.values())]
    table(rows, "tiny-persimmon", "share of zeros")
    print()
    compare(
        "persimmon",
        {
            "ReLU": lambda f: setattr(f, "act", torch.relu),
            "GELU": lambda f: setattr(f, "act", gelu_erf),
            "GELU (tanh)": lambda f: setattr(f, "act", gelu_tanh),
        },
    )


# ---- Fuyu --------------------------------------------------------------------------------------------------


@experiment("fuyu-blind")
def fuyu_blind() -> None:
    """How much of an answer comes from the picture, and does it matter where a patch stands?"""
    patches, places = held_out("fuyu")["image_patches"], held_out("fuyu")["image_patches_indices"]
    draw = torch.Generator().manual_seed(0)
    mixed = torch.zeros_like(patches)
    for row, n in enumerate((places.amax(1) + 1).tolist()):  # pictures have 9 to 25 patches
        mixed[row, :n] = patches[row, torch.randperm(n, generator=draw)]
    rows = [
        ("as it is", *measured("fuyu")),
        ("grey patches", *measured("fuyu", image_patches=torch.zeros_like(patches))),
        ("patches in any order", *measured("fuyu", image_patches=mixed)),
        ("no picture", *measured("fuyu", image_patches_indices=torch.full_like(places, -1))),
    ]
    table(rows, "tiny-fuyu", "loss", "entropy")


@experiment("fuyu-moved")
def fuyu_moved() -> None:
    """The answer holds a place: when the shape moves, does the place move with it?"""
    from examples.shapes import Scene, Shape

    model, tokenizer = checkpoint("fuyu")
    processor, rows = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer), []
    for left in (10, 40, 70, 100):
        shape = Shape("red", "circle", 40, left, 40)
        picture = Scene(120, 150, (255, 255, 255), (shape,)).picture()
        inputs = processor("where is the red circle?\n", picture)
        T = inputs["input_ids"].shape[1]
        answer = model.generate(**inputs, max_new_tokens=8)[:, T:]
        found = processor.post_process_box_coordinates(answer)[0].places
        rows.append((str(list(shape.box)), str([round(n) for n in found[0]]) if found else "no place"))
    table(rows, "top, left, bottom, right", "answer")


# ---- All of them -------------------------------------------------------------------------------------------

NAMES = ("gpt-neo", "openai-gpt", "phi", "phi3", "persimmon", "fuyu")


@experiment("heads")
def heads() -> None:
    """Which head matters most: without which one does the loss grow most, on four texts?"""
    rows = []
    for name in NAMES:
        loss, more = without_each_head(name)
        largest, head = more[-1]
        rows.append((f"tiny-{name}", head, loss, largest, more[len(more) // 2][0]))
    table(rows, "checkpoint", "the head", "loss", "more without it", "without a middling one")


@torch.no_grad()
def without_each_head(name: str) -> tuple[float, list[tuple[float, str]]]:
    """The loss, and how much each head's absence adds to it, the least first. A pass for each head: so four
    texts, and what lies below the head's layer is computed once."""
    model = checkpoint(name)[0]
    given = {key: value[:4] for key, value in held_out(name).items()}
    outputs = {}

    def keep(stage: str, value: torch.Tensor) -> torch.Tensor:
        outputs[stage] = value
        return value

    loss = Formula(model.config, model.state_dict(), note=keep).forward(given).item()
    more = []
    for layer, head in product(*(range(n) for n in sizes(name))):
        f = Formula(model.config, model.state_dict())
        f.note = without_head(layer, head, f.D)
        f.layer = from_layer(layer, outputs, f.layer)
        more.append((f.forward(given).item() - loss, f"layer {layer} head {head}"))
    return loss, sorted(more)


def sizes(name: str) -> tuple[int, int]:
    """Layers and heads."""
    f = Formula(checkpoint(name)[0].config, {})
    return len(f.layers), f.H


def without_head(layer: int, head: int, D: int) -> Callable:
    def hear(stage: str, value: torch.Tensor) -> torch.Tensor:
        if stage != f"layers.{layer}.heads":
            return value
        value = value.clone()
        value[..., head * D : (head + 1) * D] = 0
        return value

    return hear


def from_layer(first: int, outputs: dict[str, torch.Tensor], own: Callable) -> Callable:
    """Formula.layer, with what an earlier pass has computed below the layer `first`."""

    def layer(x: torch.Tensor, i: int, attend: Callable) -> torch.Tensor:
        return outputs[f"layers.{i}.out"] if i < first else own(x, i, attend)

    return layer


@experiment("patch")
def patch() -> None:
    """Where is the animal kept? A bear's sums are put into a fox's text, one layer and token at a time."""
    model, tokenizer = checkpoint("gpt-neo")
    begin = "Once upon a time there was a"
    texts = [tokenizer.encode(f"{begin} {animal}. The") for animal in ("fox", "bear")]
    fox, bear = (traces.trace(model, ids) for ids in texts)
    words = [tokenizer.encode(f" {animal}")[0] for animal in ("fox", "bear")]

    def leaning(found: traces.Trace) -> float:
        a, b = found["logits"][0, -1, words].tolist()
        return b - a

    span = leaning(bear) - leaning(fox)
    rows, shown = [], [tokenizer.decode([id]).strip() for id in texts[0]][-4:]
    for stage in ("embeddings", *(f"layers.{i}.out" for i in fox.f.layers)):
        T = len(texts[0])
        moved = [fox.patch({stage: bear[stage]}, positions=[t]) for t in range(T - 4, T)]
        shares = [100 * (leaning(one) - leaning(fox)) / span for one in moved]
        rows.append((stage, *(f"{share + 0:.0f} %".replace("-0 ", "0 ") for share in shares)))
    table(rows, "towards the bear", *shown)


@experiment("depth")
def depth() -> None:
    """After how many layers is the next token decided? The logit lens on texts never seen."""
    rows = []
    for name in ("gpt-neo", "openai-gpt", "phi", "phi3", "persimmon"):
        model, given = checkpoint(name)[0], held_out(name)
        found = traces.trace(model, given["input_ids"][:4], only=["embeddings", "out", "logits"])
        final, real = found["logits"].argmax(-1), given["labels"][:4] != -100
        agree = [
            ((found.lens(i).argmax(-1) == final) & real).sum().item() / real.sum().item()
            for i in range(len(found.f.layers) + 1)
        ]
        rows.append((f"tiny-{name}", *(f"{100 * share:.0f} %" for share in agree)))
    table(rows, "says what it will say", "embeddings", *(f"layer {i}" for i in range(4)))


@experiment("way")
def way() -> None:
    """The same beginning in five models: what would each say after each of its layers?"""
    columns = []
    names = ("gpt-neo", "openai-gpt", "phi", "phi3", "persimmon")
    for name in names:
        model, tokenizer = checkpoint(name)
        found = traces.trace(model, tokenizer.encode(PROMPT), only=["embeddings", "out", "logits"])
        chances = [found.lens(i)[0, -1].softmax(-1).max(-1) for i in range(len(found.f.layers) + 1)]
        columns.append(
            [f"{look.word(tokenizer, int(id)).strip()} {100 * float(p):.0f} %" for p, id in chances]
        )
    labels = ["embeddings", *(f"layer {i}" for i in range(len(columns[0]) - 1))]
    print(f'"{PROMPT}"\n')
    table(zip(labels, *columns, strict=True), "after", *names)


# ---- Mask, padding, positions ----

SIX = ("gpt-neo", "openai-gpt", "phi", "phi3", "persimmon", "fuyu")


def grid(attn_mask: torch.Tensor) -> list[str]:
    """A row for each query: 1 where it sees a key."""
    return [" ".join("1" if value == 0 else "." for value in row) for row in attn_mask[0, 0].tolist()]


@experiment("mask")
def mask() -> None:
    """What does each token see, of five of which the first two are padding?"""
    x, given = torch.zeros(1, 5), torch.tensor([[0, 0, 1, 1, 1]])
    plain = phi.causal_mask(5, 5, None, x, True)
    padded = phi.causal_mask(5, 5, given, x, True)
    local = gpt_neo.local_mask(5, 5, 2, given, x, True)
    columns = [grid(one) for one in (plain, padded, local)]
    table(zip(range(5), *columns, strict=True), "query", "causal", "with padding", "a window of 2")


@torch.no_grad()
def padded_error(name: str, **changes: Any) -> float:
    """Largest difference of logits between a sequence behind five tokens of padding and the same alone."""
    model, tokenizer = checkpoint(name)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    padded, mask = F.pad(ids, (5, 0)), F.pad(torch.ones_like(ids), (5, 0))
    inputs = model.prepare_inputs(padded, mask, None) | changes
    return (model(**inputs).logits[:, 5:] - model(ids).logits).abs().max().item()


@experiment("padding")
def padding() -> None:
    """Five tokens of padding on the left: what if positions count them, or no mask hides them?"""
    rows = []
    for name in SIX:
        right = padded_error(name)
        counted = padded_error(name, position_ids=None)
        bare = padded_error(name, position_ids=None, attention_mask=None)
        rows.append((f"tiny-{name}", right, counted, bare))
    table(rows, "logits differ by", "as generate does", "padding has positions", "and no mask")


# ---- The cache and generate ----


@experiment("cache")
def cache_sizes() -> None:
    """How many tokens does each pass read, how long is the cache, and how much memory does it have?"""
    model, tokenizer = checkpoint("phi")
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    cache, rows = phi.KVCache(), []

    def note(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        rows.append((len(rows), inputs[0].shape[1], len(cache), cache.buffers[0][0].shape[2]))

    hook = model.model.register_forward_hook(note)
    new = model.generate(ids, max_new_tokens=16, eos_token_id=None, past_key_values=cache)
    hook.remove()
    table((row for row in rows if row[0] < 3 or row[0] > 12), "pass", "tokens read", "in the cache", "room")
    print(
        f"{ids.shape[1]} tokens of prompt, {new.shape[1] - ids.shape[1]} new ones, {len(cache)} in the cache"
    )


@experiment("cache-cost")
def cache_cost() -> None:
    """How many tokens go through the layers for 40 new ones, with the cache and without?"""
    rows = []
    for name in SIX:
        model, tokenizer = checkpoint(name)
        ids, counts = torch.tensor([tokenizer.encode(PROMPT)]), []
        for use_cache in (True, False):
            read: list[int] = []
            embedding = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
            hook = embedding.register_forward_hook(
                lambda m, given, out, read=read: read.append(given[0].numel())
            )
            model.generate(ids, max_new_tokens=40, eos_token_id=None, use_cache=use_cache)
            hook.remove()
            counts.append(sum(read))
        rows.append((f"tiny-{name}", ids.shape[1], *counts))
    table(rows, "model", "prompt", "with the cache", "without")


@experiment("top-p")
@torch.no_grad()
def top_p() -> None:
    """How many tokens may be drawn after the same beginning, at which top_p?"""
    shares, rows = (0.5, 0.9, 0.99, 0.999), []
    for name in SIX:
        model, tokenizer = checkpoint(name)
        ids = torch.tensor([tokenizer.encode("Once upon a time there was a")])
        likely = model(ids).logits[0, -1].softmax(-1).sort(descending=True).values
        kept = [int((likely.cumsum(0) < share).sum()) + 1 for share in shares]
        rows.append((f"tiny-{name}", len(likely), *kept))
    table(rows, "tokens of", "all", *(f"top_p {share}" for share in shares))


@experiment("ends-first")
def ends_first() -> None:
    """A batch of two, of which one sequence ends first: what does it hold while the other goes on?"""
    model, tokenizer = checkpoint("phi3")
    texts = [PROMPT, "Once upon a time there was an owl. The owl was"]
    rows = [tokenizer.encode(text) for text in texts]
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    free = model.generate(ids, mask, max_new_tokens=8, eos_token_id=None)[:, T:]
    stop = int(free[0, 3])
    new = model.generate(ids, mask, max_new_tokens=8, eos_token_id=stop, pad_token_id=0)[:, T:]
    print(f"without an end: {free.tolist()}")
    print(f"{stop} ends, 0 pads: {new.tolist()}")


def choose(functions: dict[str, Callable[[], None]], what: str) -> int:
    """The command line: runs those that are named, or lists all with their docstrings."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("names", nargs="*", metavar="NAME", help='one or several, or "all"; none lists them')
    asked = parser.parse_args().names
    if not asked:
        for name, function in functions.items():
            print(f"{name:16} {' '.join(function.__doc__.split())}")
        return 0
    asked = list(functions) if asked == ["all"] else asked
    if unknown := [name for name in asked if name not in functions]:
        parser.error(f"there is no {unknown[0]}: {', '.join(functions)}")
    for name in asked:
        print(" ".join(functions[name].__doc__.split()), end="\n\n")
        functions[name]()
        print(end="\n" if name != asked[-1] else "")
    return 0


if __name__ == "__main__":
    sys.exit(choose(EXPERIMENTS, "Questions about the six models, answered in seconds."))
