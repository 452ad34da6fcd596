"""What 8 and 4 bits cost in exactness: the six tiny checkpoints on texts that they were not trained on.

python -m bench.bits --write        # the table of docs/speed.md
"""

import argparse
from itertools import islice
from pathlib import Path

import torch

from decoders import kernels, tokenize, weights
from examples import train_tiny

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "speed.md"
TEXTS = 48


def rows() -> list[str]:
    lines = [
        f"| checkpoint | perplexity, float32 | {' | '.join(kernels.KINDS)} | cache of 8 bits |",
        "|---|---|" + "---|" * (len(kernels.KINDS) + 1),
    ]
    for name, recipe in train_tiny.RECIPES.items():
        folder = ROOT / "checkpoints" / f"tiny-{name.replace('_', '-')}"
        model = weights.load(recipe.model_class, folder, dtype=torch.float32)
        tokenizer = tokenize.load(folder)
        texts = list(islice(recipe.texts(train_tiny.HELD_OUT_SEED), TEXTS))
        ids, labels, inputs = (recipe.rows or train_tiny.plain_rows)(tokenizer, texts)
        costs = [kernels.error(model, ids, kind, labels=labels, **inputs) for kind in kernels.KINDS]
        costs.append(kernels.error(model, ids, cache="int8", labels=labels, **inputs))
        cells = [
            f"{cost.perplexity:.4f} ({cost.perplexity / cost.before - 1:+.2%}), logits {cost.logits:.4f}"
            for cost in costs
        ]
        lines.append(f"| {folder.name} | {costs[0].before:.4f} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="the table into docs/speed.md")
    text = "\n".join(rows()) + "\n"
    print(text)
    if parser.parse_args().write:
        page = PAGE.read_text()
        start, end = "<!-- bits -->\n", "<!-- end of bits -->"
        PAGE.write_text(page[: page.index(start) + len(start)] + text + page[page.index(end) :])


if __name__ == "__main__":
    main()
