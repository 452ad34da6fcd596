"""Beam search made visible: the tree of all texts that were followed, and which of them won.

tree = decoding.beam_tree(model, ids, tokenizer=tokenizer, num_beams=3, max_new_tokens=9)
tree                            # in a notebook: a drawing
print(tree)                     # elsewhere: a line for each branch
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from .loop import generate

Branch = tuple[int, ...]  # new ids, from the first step on

GREEN, GREY = "#1a7f37", "#8c959f"
LINE, LETTER, GAP = 36, 7.6, 22  # of a leaf, of a character of 12.5 pixels, between two tokens


class BeamTree:
    """What beam search followed after one prompt.

    `totals`: branch -> the sum of its log-probabilities, as the search compared them. `best`: the branches
    that `generate` gives, the best first. `prompt`: its ids.
    """

    def __init__(
        self, prompt: list[int], totals: Mapping[Branch, float], best: list[Branch], tokenizer: Any = None
    ):
        self.prompt, self.totals, self.best, self.tokenizer = prompt, totals, best, tokenizer

    def kind(self, branch: Branch) -> str:
        """ "best", "kept" (it leads to another of the results), or "dropped"."""
        n = len(branch)
        if self.best[0][:n] == branch:
            return "best"
        return "kept" if any(text[:n] == branch for text in self.best) else "dropped"

    def word(self, branch: Branch) -> str:
        """The last token of a branch, as it continues the text; without a tokenizer its id."""
        if self.tokenizer is None:
            return str(branch[-1])
        before = self.tokenizer.decode([*self.prompt, *branch[:-1]])
        return self.tokenizer.decode([*self.prompt, *branch]).removeprefix(before)

    @property
    def start(self) -> str:
        """The prompt; without a tokenizer its ids."""
        if self.tokenizer is None:
            return " ".join(map(str, self.prompt))
        return self.tokenizer.decode(self.prompt)

    def children(self) -> dict[Branch, list[Branch]]:
        """Branch -> those one token longer, the most probable first."""
        found: dict[Branch, list[Branch]] = {branch: [] for branch in [(), *self.totals]}
        for branch in self.totals:
            found[branch[:-1]].append(branch)
        return {b: sorted(longer, key=lambda c: -self.totals[c]) for b, longer in found.items()}

    def in_order(self) -> list[Branch]:
        """The prompt's empty branch and all others, each before what follows it."""
        children, pending, found = self.children(), [Branch()], []
        while pending:
            found.append(pending.pop())
            pending += reversed(children[found[-1]])
        return found

    def heights(self) -> dict[Branch, float]:
        """Where each branch stands in a drawing: leaves at 0, 1, 2 ..., others amid what follows them."""
        children, order = self.children(), self.in_order()
        leaves = [branch for branch in order if not children[branch]]
        heights = {leaf: float(place) for place, leaf in enumerate(leaves)}
        for branch in reversed(order):
            if longer := children[branch]:
                heights[branch] = sum(heights[each] for each in longer) / len(longer)
        return heights

    # In a notebook

    def __repr__(self) -> str:
        lines = [self.start]
        for branch in self.in_order()[1:]:
            mark = {"best": "*", "kept": "+", "dropped": " "}[self.kind(branch)]
            lines.append(f"{mark} {'  ' * len(branch)}{self.word(branch)!r} {self.totals[branch]:.2f}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """An SVG picture: tokens to the right, beams downwards; green is the best, grey was dropped."""
        words = {branch: shown(self.word(branch)) for branch in self.totals}
        columns = self.columns(words)
        heights = {branch: LINE * height + 20 for branch, height in self.heights().items()}
        parts = [text(0, heights[()], shown(self.start), "currentColor", bold=True)]
        for branch in self.totals:
            colour = {"best": GREEN, "kept": "currentColor", "dropped": GREY}[self.kind(branch)]
            x, y, wide = columns[len(branch)], heights[branch], self.kind(branch) == "best"
            parts.append(line(x - GAP + 3, heights[branch[:-1]], x - 4, y, colour, 2.4 if wide else 1.2))
            parts.append(text(x, y, words[branch], colour, bold=wide))
            parts.append(text(x, y + 13, f"{self.totals[branch]:.2f}", colour, size=9.5))
        caption = (
            f"{len(self.best)} beams. Below each token: the logarithm of the probability so far. Green is "
            "the best, black another of the results, grey was dropped."
        )
        return (
            f'<div style="overflow-x: auto"><p>{caption}</p>'
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns[-1]:.0f}" '
            f'height="{max(heights.values()) + 24:.0f}" role="img" aria-label="a tree of beams">'
            f"{''.join(parts)}</svg></div>"
        )

    def columns(self, words: Mapping[Branch, str]) -> list[float]:
        """Where tokens of each depth begin, in pixels, and where the last ones end."""
        ends = [LETTER * len(shown(self.start)) + GAP]
        for depth in range(1, max(map(len, words)) + 1):
            longest = max(max(len(word), 5) for branch, word in words.items() if len(branch) == depth)
            ends.append(ends[-1] + LETTER * longest + GAP)
        return [0.0, *ends]


def shown(word: str) -> str:
    """White space is seen."""
    return word.replace("\n", "↵").replace(" ", "␣") or "␀"


def text(x: float, y: float, word: str, colour: str, size: float = 12.5, bold: bool = False) -> str:
    style = f'font-family="monospace" font-size="{size}" fill="{colour}"'
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}{weight}>{escape(word)}</text>'


def line(x: float, y: float, to_x: float, to_y: float, colour: str, width: float) -> str:
    ends = f'x1="{x:.1f}" y1="{y - 4:.1f}" x2="{to_x:.1f}" y2="{to_y - 4:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


class Recorder:
    """A logits processor that changes nothing, and notes which beams are followed."""

    def __init__(self, prompt_length: int):
        self.T = prompt_length
        self.totals: dict[Branch, float] = {(): 0.0}
        self.next: dict[Branch, Tensor] = {}  # (V,) log-probabilities, of all steps: a beam may end in any

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        branches = [tuple(row) for row in ids[:, self.T :].tolist()]
        for branch in branches:
            self.note(branch)
        self.next.update(zip(branches, scores.clone(), strict=True))
        return scores

    def note(self, branch: Branch) -> None:
        if branch not in self.totals:
            *_, token = branch
            self.totals[branch] = self.totals[branch[:-1]] + float(self.next[branch[:-1]][token])


def beam_tree(
    model: Any, input_ids: Tensor | Sequence[int], *, tokenizer: Any = None, **settings: Any
) -> BeamTree:
    """The tree of one prompt's beams: ids (1, T), or a list. `settings` as `generate` takes them, with
    `num_beams` of two at least, and all beams as results unless `num_return_sequences` says otherwise.
    ValueError for several prompts, one beam, and groups of beams, which are several trees."""
    ids = torch.as_tensor(input_ids, device=next(model.parameters()).device)
    ids = ids[None] if ids.dim() == 1 else ids
    beams = settings.get("num_beams") or 1
    if len(ids) != 1 or beams < 2 or (settings.get("num_beam_groups") or 1) > 1:
        raise ValueError("a tree has one prompt, num_beams of two at least, and no num_beam_groups")
    recorder = Recorder(ids.shape[1])
    own = [*(settings.pop("logits_processor", None) or ()), recorder]
    settings = {"num_return_sequences": beams, **settings, "return_dict_in_generate": True}
    found = generate(model, ids, logits_processor=own, tokenizer=tokenizer, **settings)
    rows = found.sequences[:, ids.shape[1] :].tolist()
    lengths = (found.beam_indices >= 0).sum(1).tolist()  # -1 after the end
    best = [tuple(row[:n]) for row, n in zip(rows, lengths, strict=True)]
    for branch in best:
        for n in range(1, len(branch) + 1):
            recorder.note(branch[:n])
    del recorder.totals[()]
    return BeamTree(ids[0].tolist(), recorder.totals, best, tokenizer)
