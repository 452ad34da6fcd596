"""An SVG: of each model tokens a second over the error of the logits, every engine a dot with its name."""

import math

from bench.peers.table import Results

WIDTH, HEIGHT, LEFT, TOP = 430, 300, 60, 40  # of one model's chart
COLORS = {
    "ours": "#0072b2",
    "llama.cpp": "#d55e00",
    "Transformers": "#555555",
    "ONNX Runtime": "#009e73",
    "OpenVINO": "#cc79a7",
    "CTranslate2": "#e69f00",
    "torchao": "#56b4e9",
}
LETTER = 7  # width of a letter, about
Box = tuple[float, float, float]  # from, to, height


def picture(results: dict[str, Results]) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(results)} {HEIGHT + 90}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for n, (name, one) in enumerate(results.items()):
        lines += Chart(name, one, WIDTH * n).lines()
    return "\n".join([*lines, "</svg>"]) + "\n"


class Chart:
    def __init__(self, name: str, results: Results, left: int):
        self.name, self.results, self.left = name, results, left
        errors = [math.log10(one["error"]) for one in results.values()]
        self.first, self.last = math.floor(min(errors) * 2) / 2, math.ceil(max(errors) * 2 + 0.4) / 2
        self.fastest = max(one["decode 512"] for one in results.values()) * 1.1

    def x(self, error: float) -> float:
        share = (math.log10(error) - self.first) / (self.last - self.first)
        return self.left + LEFT + share * (WIDTH - LEFT - 20)

    def y(self, speed: float) -> float:
        return TOP + HEIGHT * (1 - speed / self.fastest)

    def lines(self) -> list[str]:
        return [*self.axes(), *self.dots()]

    def axes(self) -> list[str]:
        left, bottom = self.left + LEFT, TOP + HEIGHT
        lines = [f'<text x="{left}" y="20" font-size="15">{self.name}</text>']
        begin, end = self.x(10**self.first), self.x(10**self.last)
        for speed in range(0, int(self.fastest), 10 if self.fastest < 100 else 50):
            at = self.y(speed)
            lines.append(
                f'<line x1="{begin:.0f}" x2="{end:.0f}" y1="{at:.0f}" y2="{at:.0f}" stroke="#ddd"/>'
                f'<text x="{begin - 8:.0f}" y="{at + 4:.0f}" text-anchor="end">{speed}</text>'
            )
        for error in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
            if self.first <= math.log10(error) <= self.last:
                place = f'x="{self.x(error):.0f}" y="{bottom + 18}"'
                lines.append(f'<text {place} text-anchor="middle">{error:g}</text>')
        label = "error of the logits; upwards: tokens a second after 512"
        return [*lines, f'<text x="{left}" y="{bottom + 38}">{label}</text>']

    def dots(self) -> list[str]:
        """From top to bottom, each name where it covers no dot and no other name."""
        places = {
            name: (self.x(one["error"]), self.y(one["decode 512"])) for name, one in self.results.items()
        }
        taken: list[Box] = [(x - 6, x + 6, y + 4) for x, y in places.values()]
        lines = []
        for name, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
            color = next(color for kin, color in COLORS.items() if name.startswith(kin))
            shift, height = self.label_place(x, y, LETTER * len(name), taken)
            place = f'x="{x + shift:.0f}" y="{height:.0f}"'
            anchor = "start" if shift > 0 else "end"
            lines.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}"/>'
                f'<text {place} fill="{color}" text-anchor="{anchor}">{name}</text>'
            )
        return lines

    def label_place(self, x: float, y: float, length: int, taken: list[Box]) -> tuple[int, float]:
        """(right or left of the dot, height), the nearest that is free; `taken` has it then."""
        is_left = x < self.left + WIDTH - 130
        choices = [
            (abs(down) + (0 if (shift > 0) == is_left else 9), shift, down)
            for down in range(-60, 61, 2)
            for shift in (9, -9)
        ]
        for _, shift, down in sorted(choices):
            begin, height = x + (shift if shift > 0 else shift - length), y + 4 + down
            is_inside = self.left + LEFT - 30 <= begin and begin + length <= self.left + WIDTH + 10
            if is_inside and not any(
                abs(height - at) < 13 and begin < b and a < begin + length for a, b, at in taken
            ):
                break
        taken.append((begin, begin + length, height))
        return shift, height
