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


def next_text(tokenizer: tokenize.Tokenizer, before: list[int], id: int) -> str:
    return tokenizer.decode([*before, id]).removeprefix(tokenizer.decode(before))


def beams(file: Path, steps: int = 9, width: int = 3) -> None:
    folder = ROOT / "checkpoints" / "tiny-gpt-neo"
    tokenizer = tokenize.load(folder)
    model = weights.load(gpt_neo.GPTNeoForCausalLM, folder, dtype=torch.float32)
    start = tokenizer.encode("Once upon a time")
    tree = decoding.beam_tree(
        model, start, tokenizer=tokenizer, num_beams=width, max_new_tokens=steps, eos_token_id=None
    )
    draw_tree(file, tree)


def draw_tree(file: Path, tree: decoding.BeamTree) -> None:
    heights = tree.heights()
    top = max(heights.values())
    figure, axes = plt.subplots(figsize=(13, 0.62 * (top + 1) + 1), layout="constrained")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    for branch, height in heights.items():
        kind, n, y = tree.kind(branch), len(branch), top - height
        colour = {"best": GREEN, "kept": "black", "dropped": GREY}[kind]
        style = {"color": colour, "va": "center", "weight": "bold" if kind == "best" else None}
        if not branch:
            axes.text(0, y, tree.start.replace("upon ", "upon\n"), fontsize=11, bbox=box, **style)
            continue
        ends = [top - heights[branch[:-1]], y]
        axes.plot([n - 0.4, n - 0.05], ends, color=colour, lw=2.5 if kind == "best" else 1.2)
        axes.text(n, y, tree.word(branch).replace(" ", "␣"), fontsize=11, bbox=box, **style)
        axes.text(n, y - 0.34, f"{tree.totals[branch]:.2f}", fontsize=8, **style)
    axes.set(xlim=(-0.2, max(map(len, heights)) + 1), ylim=(-0.7, top + 0.6))
    axes.axis("off")
    caption = (
        "what was followed, and the logarithm of its chance so far. Green is the best, grey was dropped."
    )
    axes.set_title(f"{len(tree.best)} beams: {caption}", fontsize=10, loc="left")
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
