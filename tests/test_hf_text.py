"""The documented tokenizers call by call: every field as Transformers' fast tokenizer of the same folder gives it."""

import json
import os
import random
from pathlib import Path

import pytest

from decoders.tools import hf

transformers = pytest.importorskip("transformers")
DATA = Path(os.environ.get("DECODERS_TEST_DATA", "/nowhere")) / "hub"
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
FOLDERS = ["phi-2", "phi-3-mini-4k", "phi-3.5-mini", "phi-4", "phi-4-mini", "gpt-neo-125m", "openai-gpt"]
TINY = ["tiny-phi", "tiny-phi3", "tiny-persimmon", "tiny-fuyu", "tiny-gpt-neo", "tiny-openai-gpt"]
WORDS = ["Hello", "world", "don't", "a", "the owl", "I'm", "Café", "naïve", "日本語", "🤗🤗", "x = 1", "    return", "\n\n", "\t", "  ", "1234567",
         "E=mc²", "…", "“quoted”", "<b>", "/usr/bin", "HTTPServer", "one,two", "?!", "Ελλάδα", "fin.", "-", "ß", "İ", "ﬁ", ""]


def folder_of(name: str) -> Path:
    folder = (CHECKPOINTS if name.startswith("tiny") else DATA) / name
    if not folder.is_dir():
        pytest.skip("DECODERS_TEST_DATA is not set: no real tokenizers")
    return folder


@pytest.fixture(scope="module", params=FOLDERS + TINY)
def pair(request):
    folder = folder_of(request.param)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = hf.AutoTokenizer.from_pretrained(folder)
    if theirs.pad_token is None:
        theirs.pad_token = ours.pad_token = theirs.eos_token or theirs.unk_token
    theirs.padding_side = ours.padding_side
    return ours, theirs


def a_text(rng: random.Random) -> str:
    return rng.choice(["", " "]).join(rng.choice(WORDS) + rng.choice(["", " "]) for _ in range(rng.randint(0, 9)))


def a_call(rng: random.Random, offsets: bool) -> tuple[tuple, dict]:
    batched, paired = rng.random() < 0.5, rng.random() < 0.4
    n = rng.randint(1, 4)
    texts = [a_text(rng) for _ in range(n)]
    others = [a_text(rng) for _ in range(n)]
    args = (texts if batched else texts[0], *((others if batched else others[0],) if paired else ()))
    if batched and paired and rng.random() < 0.3:
        args = (list(zip(texts, others, strict=True)),)
    options = {"add_special_tokens": rng.random() < 0.8}
    if rng.random() < 0.5:
        options["padding"] = rng.choice([True, "longest", "max_length", False, "do_not_pad"])
        options["padding_side"] = rng.choice(["left", "right"])
    if rng.random() < 0.5 or options.get("padding") == "max_length":
        options["max_length"] = rng.randint(6, 30)
        options["truncation"] = rng.choice([True, "longest_first", False, *(["only_first", "only_second"] if paired and len(args) == 2 else ["only_first"])])
    if rng.random() < 0.3:
        options["return_token_type_ids"] = True
    if rng.random() < 0.3:
        options["return_special_tokens_mask"] = True
    if rng.random() < 0.2:
        options["return_length"] = True
    if rng.random() < 0.2:
        options["return_attention_mask"] = False
    if rng.random() < 0.2 and options.get("padding"):
        options["pad_to_multiple_of"] = 8
    if offsets and rng.random() < 0.4:
        options["return_offsets_mapping"] = True
    if options.get("truncation") in ("only_first", "only_second") and rng.random() < 0.4:
        options |= {"return_overflowing_tokens": True, "stride": rng.randint(0, 3)}
    return args, options


def called(tokenizer, args: tuple, options: dict):
    """What comes back, or that it cannot be."""
    try:
        found = tokenizer(*args, **options)
    except BaseException:  # noqa: BLE001  theirs panics in Rust
        return "refused"
    return json.loads(json.dumps({key: found[key] for key in sorted(found.keys())}))


@pytest.mark.parametrize("part", range(2))
def test_a_call_gives_what_transformers_gives(pair, part):
    """Some ten thousand calls over all tokenizers: batches, pairs, padding, truncation, windows, places."""
    ours, theirs = pair
    rng = random.Random(part)
    for _ in range(360):
        args, options = a_call(rng, offsets=True)
        assert called(ours, args, options) == called(theirs, args, options), (args, options)
