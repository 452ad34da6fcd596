"""Pictures of coloured shapes, with questions and answers: what tiny-fuyu is trained on.

    python -m examples.shapes 3 --out /tmp/shapes      # three pictures, and what can be asked about them

A picture of 90 to 150 pixels has one or two shapes of several sizes and colours on a ground of its own. The
same seed always gives the same pictures. Needs `pip install '.[images]'`.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
    "purple": (150, 60, 190),
}
KINDS = ("circle", "square", "triangle")
GROUNDS = ((255, 255, 255), (225, 225, 220), (200, 215, 230), (60, 60, 65), (20, 20, 20))
SIDES = (90, 100, 120, 150)
CAPTION = "Generate a coco-style caption.\n"


class Shape(NamedTuple):
    """One thing in a picture, in pixels."""

    colour: str
    kind: str
    top: int
    left: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """top, left, bottom, right."""
        return self.top, self.left, self.top + self.size, self.left + self.size


class Scene(NamedTuple):
    """What a picture shows; the first shape is the one to the left, or above."""

    height: int
    width: int
    ground: tuple[int, int, int]
    shapes: tuple[Shape, ...]

    @property
    def caption(self) -> str:
        first, *others = self.shapes
        if not others:
            return f"a {first.name}"
        across = abs(first.left - others[0].left) > abs(first.top - others[0].top)
        return f"a {first.name} {'left of' if across else 'above'} a {others[0].name}"

    def picture(self) -> Image.Image:
        image = Image.new("RGB", (self.width, self.height), self.ground)
        draw = ImageDraw.Draw(image)
        for shape in self.shapes:
            top, left, bottom, right = shape.box
            corners, colour = (left, top, right - 1, bottom - 1), COLOURS[shape.colour]
            if shape.kind == "circle":
                draw.ellipse(corners, fill=colour)
            elif shape.kind == "square":
                draw.rectangle(corners, fill=colour)
            else:
                peak = ((left + right) // 2, top)
                draw.polygon([peak, (left, bottom - 1), (right - 1, bottom - 1)], fill=colour)
        return image

    def questions(self) -> list[tuple[str, str]]:
        """Prompts and answers; boxes as a prompt writes them."""
        asked = [(CAPTION, self.caption)]
        for shape in self.shapes:
            box = f"<box>{', '.join(map(str, shape.box))}</box>"
            asked += [(f"where is the {shape.name}?\n", box), (f"what is at {box}?\n", f"a {shape.name}")]
        return asked


EXAMPLE = Scene(
    120, 150, GROUNDS[2], (Shape("red", "circle", 20, 10, 50), Shape("blue", "square", 60, 90, 40))
)


def shape(rng: random.Random, height: int, width: int) -> Shape:
    size = rng.choice((30, 40, 50, 60))
    top, left = rng.randrange(0, height - size + 1, 10), rng.randrange(0, width - size + 1, 10)
    return Shape(rng.choice(list(COLOURS)), rng.choice(KINDS), top, left, size)


def scene(rng: random.Random) -> Scene:
    height, width = rng.choice(SIDES), rng.choice(SIDES)
    ground, count = rng.choice(GROUNDS), rng.choice((1, 2))
    while True:
        a, b = shape(rng, height, width), shape(rng, height, width)
        if count == 1:
            return Scene(height, width, ground, (a,))
        down, across = a.top - b.top, a.left - b.left
        apart = max(abs(down), abs(across)) >= max(a.size, b.size) + 4
        clear = abs(abs(down) - abs(across)) >= 16  # whether beside or above each other
        if apart and clear and a.name != b.name:
            first = a.left < b.left if abs(across) > abs(down) else a.top < b.top
            return Scene(height, width, ground, (a, b) if first else (b, a))


def scenes(seed: int) -> Iterator[Scene]:
    """Scenes without end."""
    rng = random.Random(seed)
    while True:
        yield scene(rng)


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over union of two boxes (top, left, bottom, right)."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, height) * max(0, width)
    area = sum(max(0, box[2] - box[0]) * max(0, box[3] - box[1]) for box in (a, b))
    return common / (area - common) if area > common else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw shapes.")
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for i, one in zip(range(args.count), scenes(args.seed), strict=False):
        file = args.out / f"shapes-{args.seed}-{i}.png"
        one.picture().save(file)
        print(file, *(f"{asked!r} -> {answer!r}" for asked, answer in one.questions()), sep="\n  ")


if __name__ == "__main__":
    main()
