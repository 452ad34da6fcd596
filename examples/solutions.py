"""Solutions of what docs/reading leaves to the reader, as code that prints its answer.

    python -m examples.solutions                    # what there is
    python -m examples.solutions neo-heads           # some of them; or "all"

docs/reading/solutions.md has each beside its question. The numbers are those of the tiny checkpoints.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from decoders import fuyu, look, phi
from decoders.compare.formula import Formula
from examples.experiments import PROMPT, checkpoint, choose, held_out, measured, table

SOLUTIONS: dict[str, Callable[[], None]] = {}
STORY = (
    "Once upon a time there was a fox. The fox had a red ball. Every day the fox took the ball to the lake."
)


def solution(function: Callable[[], None]) -> Callable[[], None]:
    """The docstring is the task; underscores in the name become dashes."""
    SOLUTIONS[function.__name__.replace("_", "-")] = function
    return function


# ---- GPT-Neo ----


@solution
def neo_beyond() -> None:
    """With the window opened, how much weight do the local layers give to what they never saw in training?"""
    far: list[float] = []
    real = (held_out("gpt-neo")["labels"] != -100)[:, None, 64:]

    def hear(stage: str, value: Tensor) -> None:
        if stage.endswith(".weights"):
            beyond = torch.ones_like(value[0, 0], dtype=torch.bool).tril(-32)  # 32 tokens away, or more
            shares = (value * beyond)[:, :, 64:].sum(-1)
            far.append(shares.masked_select(real).mean().item())

    measured("gpt-neo", lambda f: setattr(f, "windows", [None] * 4), hear)
    kinds = ("global", "local", "global", "local")
    rows = [(f"layer {i}, {kind}", share) for i, (kind, share) in enumerate(zip(kinds, far, strict=True))]
    table(rows, "tiny-gpt-neo, opened", "weight beyond 32 tokens")


@solution
def neo_scores() -> None:
    """How large are the scores of a model that does not divide them, and of one that does?"""
    rows = []
    for name in ("gpt-neo", "openai-gpt", "phi", "phi3", "persimmon"):
        spread: list[float] = []

        def hear(stage: str, value: Tensor, spread: list = spread) -> None:
            if stage.endswith(".scores"):
                spread.append(value[~value.isnan()].std().item())

        measured(name, hear=hear)
        D = Formula(checkpoint(name)[0].config, {}).D
        rows.append((f"tiny-{name}", D, *spread))
    table(rows, "spread of the scores", "D", *(f"layer {i}" for i in range(4)))


@solution
def neo_heads() -> None:
    """Which heads read the token before, and which what followed the same word earlier?"""
    model, tokenizer = checkpoint("gpt-neo")
    text = model.generate(torch.tensor([tokenizer.encode(PROMPT)]), max_new_tokens=48)
    found = look.trace(model, text, only=["weights"]).heads()
    for kind in ("previous", "induction"):
        best = sorted(((w.item(), i) for i, w in enumerate(found[kind].flatten())), reverse=True)[:3]
        heads = ", ".join(f"layer {i // 6} head {i % 6} ({w:.2f})" for w, i in best)
        print(f"{kind:9}  {heads}")


# ---- GPT-1 ----


@solution
def gpt1_positions() -> None:
    """Which positions have like embeddings, and what if all are the first?"""
    model, tokenizer = checkpoint("openai-gpt")
    table_of = model.transformer.positions_embed.weight[:128]
    alike = F.cosine_similarity(table_of[:, None], table_of[None], dim=-1)
    rows = [(f"{n} apart", alike.diagonal(n).mean().item()) for n in (1, 2, 4, 8, 16, 32, 64)]
    table(rows, "positions", "cosine")
    print()
    ids, rows = tokenizer.encode(STORY), []
    for label, inputs in (
        ("as it is", {}),
        ("all the first", {"position_ids": torch.zeros(1, len(ids)).long()}),
    ):
        found = look.trace(model, ids, only=["weights"], **inputs).heads()
        rows.append((label, *(found[kind].mean().item() for kind in ("entropy", "distance", "previous"))))
    table(rows, "positions", "entropy", "distance", "weight on the token before")


# ---- Phi ----


@solution
@torch.no_grad()
def phi_bias() -> None:
    """How much of a logit is bias, and which tokens does the bias alone make likely?"""
    model, tokenizer = checkpoint("phi")
    found = look.trace(model, tokenizer.encode(PROMPT))
    logits = found["logits"][0]
    bias = model.lm_head.bias
    chosen = logits.argmax(-1)
    share = (bias[chosen] / logits.gather(1, chosen[:, None])[:, 0]).mean().item()
    print(f"the bias is {100 * share:.1f} % of the largest logit, on average")
    best, order = bias.sort(descending=True)
    words = ", ".join(
        f"{tokenizer.decode([i])!r} {b:+.2f}" for b, i in zip(best[:6], order[:6].tolist(), strict=True)
    )
    print(f"the largest biases: {words}")
    print(f"the smallest: {best[-1]:+.2f}")
    print(f"their spread is {bias.std():.2f}, that of the logits {logits.std():.2f}")


# ---- Phi-3 ----


@solution
def phi3_gate_why() -> None:
    """Gate and up taken for each other: how far is the product off?"""
    model = checkpoint("phi3")[0]
    products = []

    def hear(stage: str, value: Tensor) -> None:
        if stage.endswith("mlp_up"):
            gate, up = value.chunk(2, -1)
            right, wrong = up * F.silu(gate), gate * F.silu(up)
            alike = F.cosine_similarity(right.flatten(), wrong.flatten(), dim=0).item()
            products.append((f"layer {len(products)}", alike))

    measured("phi3", hear=hear)
    table(products, type(model).__name__, "cosine of right and wrong product")


@solution
def phi3_shared() -> None:
    """Do two heads that share their keys read more alike than two that do not?"""
    model, tokenizer = checkpoint("phi3")
    found = look.trace(model, tokenizer.encode(STORY), only=["weights"])
    rows = []
    for layer in range(4):
        w = found.attention_weights(layer)[0]

        def overlap(a: int, b: int, w: Tensor = w) -> float:
            """The weight that two heads give to the same tokens, 0 to 1."""
            return torch.minimum(w[a], w[b]).sum(-1)[1:].mean().item()

        others = (overlap(0, 2) + overlap(0, 3) + overlap(1, 2) + overlap(1, 3)) / 4
        rows.append((f"layer {layer}", overlap(0, 1), overlap(2, 3), others))
    table(rows, "weight in common", "heads 0 and 1", "heads 2 and 3", "of different groups")


# ---- Persimmon ----


@solution
def persimmon_silent() -> None:
    """Which layer is the most silent, and are the same numbers silent for the same word elsewhere?"""
    model, tokenizer = checkpoint("persimmon")
    ids = tokenizer.encode(STORY)
    found = look.trace(model, ids, only=["mlp_act"])
    fox = [i for i, id in enumerate(ids) if id == tokenizer.encode(" fox")[-1]]
    rows = []
    for layer in range(4):
        active = found[f"layers.{layer}.mlp_act"][0] != 0
        same = [in_common(active[a], active[b]) for a in fox for b in fox if a < b]
        other = [in_common(active[a], active[b]) for a in fox for b in range(len(ids)) if b not in fox]
        silent = 1 - active.double().mean().item()
        rows.append((f"layer {layer}", silent, sum(same) / len(same), sum(other) / len(other)))
    table(rows, "tiny-persimmon", "silent", "active at both foxes", "at a fox and elsewhere")


def in_common(a: Tensor, b: Tensor) -> float:
    """Of what is active at one of the two, how much is at both."""
    return ((a & b).sum() / (a | b).sum()).item()


# ---- Fuyu ----


@solution
def fuyu_edge() -> None:
    """Which head reads the patches of an edge of the shape when that edge is written?"""
    from examples.shapes import Scene, Shape

    model, tokenizer = checkpoint("fuyu")
    processor = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer)
    picture = Scene(120, 150, (255, 255, 255), (Shape("red", "circle", 40, 70, 40),)).picture()
    inputs = processor("where is the red circle?\n", picture)
    T = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=8)
    places = F.pad(inputs["image_patches_indices"], (0, ids.shape[1] - T), value=-1)
    given = {"image_patches": inputs["image_patches"], "image_patches_indices": places}
    found = look.trace(model, ids, only=["weights"], **given)
    patches = (places[0] >= 0).nonzero()[:, 0].view(-1, 5)  # 150 pixels are five patches of 30
    edges = {"top": patches[1], "left": patches[:, 2], "bottom": patches[2], "right": patches[:, 3]}
    rows = []
    for i, (side, keys) in enumerate(edges.items()):
        query = T + i  # <box>, then each number: it is read for at the token before it
        reads = [found.attention_weights(layer)[0][:, query, keys].sum(-1) for layer in range(4)]
        best, head = torch.cat(reads).max(0)
        rows.append((side, f"layer {head // 4} head {head % 4}", best.item()))
    table(rows, "edge that is written", "the head that reads it most", "weight on its patches")


# ---- Mask, padding, positions ----


@solution
@torch.no_grad()
def right_padding() -> None:
    """Padding on the right: whose logits change, and whose next token?"""
    rows = []
    for name in ("gpt-neo", "openai-gpt", "phi", "phi3", "persimmon"):
        model, tokenizer = checkpoint(name)
        ids = torch.tensor([tokenizer.encode(PROMPT)])
        T = ids.shape[1]
        alone = model(ids).logits
        padded = model(F.pad(ids, (0, 5)), attention_mask=F.pad(torch.ones_like(ids), (0, 5))).logits
        change = (padded[:, :T] - alone).abs().max().item()
        same = bool(padded[0, T - 1].argmax() == alone[0, -1].argmax())
        last = tokenizer.decode([int(padded[0, -1].argmax())])
        rows.append((f"tiny-{name}", change, "the same" if same else "another", repr(last)))
    table(rows, "logits of real tokens", "change", "next token after the last", "after the padding")


# ---- The cache and generate ----


@solution
@torch.no_grad()
def two_answers() -> None:
    """One prompt's cache, and two answers that go on from it without disturbing each other."""
    model, tokenizer = checkpoint("phi")
    prompt = torch.tensor([tokenizer.encode("Once upon a time there was a")])
    cache = phi.KVCache()
    model(prompt[:, :-1], past_key_values=cache)
    for animal in (" fox", " bear"):
        ids = torch.cat([prompt, torch.tensor([tokenizer.encode(animal)])], 1)
        own = phi.KVCache(tuple(cache))
        new = model.generate(ids, past_key_values=own, max_new_tokens=12)
        alone = model.generate(ids, max_new_tokens=12)
        print(f"{tokenizer.decode(new[0].tolist())!r}; as without the cache: {torch.equal(new, alone)}")
    print(f"{len(cache)} tokens in the first cache, {len(own)} in the last copy")


if __name__ == "__main__":
    sys.exit(choose(SOLUTIONS, "Solutions of docs/reading, as code that prints its answer."))
