"""The ready kits of kits/: one for each family, small enough to be kept in a repository.

python -m examples.kits            # writes kits/gpt_neo, kits/openai-gpt ... anew
"""

from pathlib import Path

from decoders import compare

KITS = Path(__file__).parent.parent / "kits"
FAMILIES = ("gpt_neo", "openai-gpt", "phi", "phi3", "persimmon", "fuyu")


def main() -> None:
    for family in FAMILIES:
        folder = compare.make(KITS / family, family, compact=True)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder.relative_to(KITS.parent)}: {size:,} bytes")


if __name__ == "__main__":
    main()
