"""Tables that commands write into docs/speed.md."""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"


def digits(x: float) -> str:
    """Three digits, with commas between thousands."""
    rounded = float(f"{x:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def write_table(name: str, text: str) -> None:
    """Put `text`, whole lines, between `<!-- name -->` and `<!-- end of name -->`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    old = PAGE.read_text()
    PAGE.write_text(old[: old.index(begin) + len(begin)] + text + old[old.index(end) :])
