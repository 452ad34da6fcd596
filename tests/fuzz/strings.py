"""Random strings, ids by ours and by Hugging Face's fast tokenizer: python -m tests.fuzz.strings --minutes 60 --seed 3

Over the vocabularies of the tiny checkpoints, and the real ones where DECODERS_TEST_DATA is. What differs is shrunk to
the shortest string that does and printed as a test.
"""

import functools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from decoders import tokenize
from tests.fuzz.budget import arguments, numbers

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
BLANKS = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b\u00ad\ufeff"
MARKS = "=-_*#.~/\\|<>()[]{}'\"`^+,;:!?@%&$0123456789"
ODD = "éßİſǅʰٱ५Ⅷ\u0301\u200d\u0130日本語ंกรุง한国🤗👩\u200d👩\x00\x7f\ufffd\u0378\U000e0001▁Ġ"


@functools.cache
def vocabularies() -> dict[str, tuple[tokenize.Tokenizer, Any]]:
    """Name -> ours, theirs."""
    folders = sorted(CHECKPOINTS.glob("tiny-*"))
    if data := os.environ.get("DECODERS_TEST_DATA"):
        folders += [
            folder for folder in sorted((Path(data) / "hub").iterdir()) if (folder / "config.json").exists()
        ]
    return {folder.name: (tokenize.load(folder), theirs(folder)) for folder in folders}


def theirs(folder: Path) -> Callable[[str], list[int]]:
    if (folder / "tokenizer.json").exists() and "openai" not in folder.name:
        fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "tokenizer.model").exists():
        fast = converted(folder)
    else:
        import transformers

        fast = transformers.AutoTokenizer.from_pretrained(folder)._tokenizer
    return lambda text: fast.encode(text, add_special_tokens=False).ids


def converted(folder: Path, begin: str | None = None) -> tokenizers.Tokenizer:
    """The fast tokenizer that Transformers makes of a unigram tokenizer.model."""
    import sentencepiece

    from examples.vocabularies import whole_sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = [(pieces.id_to_piece(id), pieces.get_score(id)) for id in range(len(pieces))]
    listed = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added = [{"id": int(id), **token} for id, token in listed.items()]
    model = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": vocab}
    fast = tokenizers.Tokenizer.from_str(json.dumps(whole_sentencepiece(model, added, begin)))
    fast.model = tokenizers.models.Unigram(vocab, 0, True)  # the chances as they are: JSON would be rounded
    return fast


def texts(rng: random.Random, words: list[str]) -> Iterator[str]:
    """Runs, code points from anywhere, pieces of the vocabulary glued together, and all of it mixed."""
    while True:
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.25:  # runs, where ties decide
                char = rng.choice(MARKS + BLANKS + ODD + rng.choice(words))
                parts.append(char * rng.choice((2, 3, 4, 5, 7, 9, 16, 33, 35, 64, 100)))
            elif kind < 0.35:
                parts.append(rng.choice(words)[:3] * rng.randint(2, 20))
            elif kind < 0.7:
                parts.append(rng.choice(words))
            elif kind < 0.85:
                parts.append(rng.choice(MARKS + BLANKS + ODD))
            else:
                code = rng.choice((rng.randrange(0x300), rng.randrange(0x10000), rng.randrange(0x110000)))
                parts.append("" if 0xD800 <= code < 0xE000 else chr(code))
        yield "".join(parts)


def shrunk(text: str, differs: Callable[[str], bool]) -> str:
    """The shortest string found by leaving parts out that still differs."""
    size = len(text) // 2
    while size:
        for start in range(len(text) - size + 1):
            if differs(text[:start] + text[start + size :]):
                text = text[:start] + text[start + size :]
                break
        else:
            size = min(size // 2, len(text))
    return text


def run(
    seed: int, cases: int | None = None, seconds: float | None = None
) -> tuple[dict[str, int], list[str]]:
    """How many strings were tried by vocabulary, and what differed, as tests."""
    counts: dict[str, int] = {}
    failures: list[str] = []
    todo = []
    for name, (ours, fast) in vocabularies().items():
        words = [
            word.decode("utf-8", "replace").replace("▁", " ").replace("</w>", " ")
            for word in ours.bytes_of.values()
        ]
        todo.append(
            (name, ours, fast, texts(random.Random(f"{name} {seed}"), [word for word in words if word]))
        )
    for _ in numbers(cases and -(-cases // (50 * len(todo))), seconds):
        if len(failures) >= 20:
            break
        for name, ours, fast, strings in todo:
            for _ in range(50):
                text = next(strings)
                counts[name] = counts.get(name, 0) + 1
                if ours.encode(text, False) != fast(text):
                    text = shrunk(
                        text, lambda text, ours=ours, fast=fast: ours.encode(text, False) != fast(text)
                    )
                    failures.append(
                        f'    ("{name}", {ascii(text)}),  # {fast(text)}, not {ours.encode(text, False)}'
                    )
    return counts, failures


def main() -> int:
    given = arguments(__doc__)
    counts, failures = run(given.seed, given.cases, given.seconds)
    total, differ = sum(counts.values()), len(failures)
    print(f"{total} strings over {len(counts)} vocabularies, {differ} differ (seed {given.seed})")
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
