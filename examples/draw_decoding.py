"""The pictures of docs/decoding.md: python -m examples.draw_decoding     (needs matplotlib)

A tree of beams as they were followed and dropped, with the logarithm of each text's chance; a text written
with an assistant, with the tokens that it drafted in colour.
"""

import copy
from pathlib import Path

import matplotlib
import torch

from decoders import decoding, gpt_neo, tokenize, weights

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
GREEN, RED, GREY = "#1a7f37", "#cf222e", "#8c959f"
Branch = tuple[int, ...]  # new ids


def next_text(tokenizer: tokenize.Tokenizer, before: list[int], id: int) -> str:
    return tokenizer.decode([*before, id]).removeprefix(tokenizer.decode(before))


def beams(file: Path, steps: int = 9, width: int = 3) -> None:
    folder = ROOT / "checkpoints" / "tiny-gpt-neo"
    tokenizer = tokenize.load(folder)
    model = weights.load(gpt_neo.GPTNeoForCausalLM, folder, dtype=torch.float32)
    start = tokenizer.encode("Once upon a time")
    followed: set[Branch] = {()}

    def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        followed.update(map(tuple, ids[:, len(start) :].tolist()))
        return scores

    found = decoding.generate(
        model, torch.tensor([start]), num_beams=width, num_return_sequences=width, max_new_tokens=steps,
        eos_token_id=None, logits_processor=[watch])  # fmt: skip
    best = [tuple(row) for row in found[:, len(start) :].tolist()]
    draw_tree(file, followed | set(best), best, tokenizer, model, start)


def draw_tree(
    file: Path,
    branches: set[Branch],
    best: list[Branch],
    tokenizer: tokenize.Tokenizer,
    model: torch.nn.Module,
    start: list[int],
) -> None:
    inner = {branch[:n] for branch in branches for n in range(len(branch))}
    leaves = sorted(branches - inner, key=lambda leaf: [tokenizer.decode([id]) for id in leaf], reverse=True)
    height: dict[Branch, float] = {leaf: place for place, leaf in enumerate(leaves)}
    for branch in sorted(inner, key=len, reverse=True):
        above = [height[other] for other in height if other and other[:-1] == branch]
        height[branch] = sum(above) / len(above)
    figure, axes = plt.subplots(figsize=(13, 0.62 * len(leaves) + 1), layout="constrained")
    for branch in branches:
        n, y, wins = len(branch), height[branch], best[0][: len(branch)] == branch
        kept = any(text[:n] == branch for text in best)
        colour = GREEN if wins else "black" if kept else GREY
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        style = {"color": colour, "va": "center", "weight": "bold" if wins else None}
        if not branch:
            prompt = tokenizer.decode(start).replace("upon ", "upon\n")
            axes.text(0, y, prompt, fontsize=11, bbox=box, **style)
            continue
        axes.plot([n - 0.4, n - 0.05], [height[branch[:-1]], y], color=colour, lw=2.5 if wins else 1.2)
        word = next_text(tokenizer, [*start, *branch[:-1]], branch[-1]).replace(" ", "␣")
        axes.text(n, y, word, fontsize=11, bbox=box, **style)
        total = decoding.score(model, torch.tensor([[*start, *branch]]))[0, len(start) - 1 :].sum()
        axes.text(n, y - 0.34, f"{total:.2f}", fontsize=8, **style)
    axes.set(xlim=(-0.2, max(map(len, leaves)) + 1), ylim=(-0.7, len(leaves) - 0.4))
    axes.axis("off")
    caption = (
        "what was followed, and the logarithm of its chance so far. Green is the best, grey was dropped."
    )
    axes.set_title(f"{len(best)} beams: {caption}", fontsize=10, loc="left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def rounded(model: torch.nn.Module, steps: int) -> torch.nn.Module:
    """A worse model of the same vocabulary: matrices in so many steps from 0 to a row's largest number."""
    worse = copy.deepcopy(model)
    with torch.no_grad():
        for p in worse.parameters():
            if p.dim() > 1:
                step = p.abs().amax(1, keepdim=True) / steps
                p.copy_((p / step).round() * step)
    return worse


def assisted(file: Path, columns: int = 122) -> None:
    folder = ROOT / "checkpoints" / "tiny-gpt-neo"
    tokenizer = tokenize.load(folder)
    model = weights.load(gpt_neo.GPTNeoForCausalLM, folder, dtype=torch.float32)
    said = tokenizer.encode("Once upon a time")
    found = decoding.generate(
        model, torch.tensor([said]), assistant_model=rounded(model, 4), num_assistant_tokens=6,
        max_new_tokens=100, return_dict_in_generate=True)  # fmt: skip
    new = found.sequences[0, len(said) :].tolist()
    written, pieces = len(new), [(tokenizer.decode(said), GREY)]
    for drafted, accepted in found.stats["rounds"]:
        own = new[accepted : accepted + 1]
        for ids, colour in ((drafted[:accepted], GREEN), (drafted[accepted:], RED), (own, "black")):
            before = list(said)
            for id in ids:
                pieces.append((next_text(tokenizer, before, id), colour))
                before.append(id)
            said = said if colour == RED else before
        new = new[accepted + 1 :]
    figure, axes = plt.subplots(figsize=(11, 2.9), layout="constrained")
    axes.axis("off")
    column = line = 0
    for text, colour in pieces:
        shown = text.replace("\n", "⏎")
        if column + len(shown) > columns:
            column, line, shown = 0, line + 1, shown.lstrip()
        style = {"family": "monospace", "fontsize": 10.5, "weight": "bold" if colour == GREEN else None}
        place = column / columns, 0.88 - 0.17 * line
        axes.text(*place, shown, color=colour, transform=axes.transAxes, **style)
        if colour == RED:
            blank = len(shown) - len(shown.lstrip())
            ends = [(column + blank) / columns, (column + len(shown)) / columns]
            axes.plot(ends, [0.905 - 0.17 * line] * 2, color=RED, lw=1, transform=axes.transAxes)
        column += len(shown)
    caption = "Green: drafted, accepted. Red: drafted, rejected. Black: the model's own."
    title = f"{written} tokens in {found.stats['passes']} passes; the assistant is the model itself, coarser."
    axes.set_title(f"{title} {caption}", fontsize=10, loc="left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    beams(ROOT / "docs" / "beams.png")
    assisted(ROOT / "docs" / "assisted.png")
