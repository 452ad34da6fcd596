"""The documented tokenizers call by call: every field as Transformers' fast tokenizer of the same folder gives it."""

import json
import os
import random
from pathlib import Path

import pytest

from decoders import hf

transformers = pytest.importorskip("transformers")
DATA = Path(os.environ.get("DECODERS_TEST_DATA", "/nowhere")) / "hub"
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
FOLDERS = ["phi-2", "phi-3-mini-4k", "phi-3.5-mini", "phi-4", "phi-4-mini", "gpt-neo-125m", "openai-gpt"]
TINY = ["tiny-phi", "tiny-phi3", "tiny-persimmon", "tiny-fuyu", "tiny-gpt-neo", "tiny-openai-gpt"]
WORDS = [
    "Hello",
    "world",
    "don't",
    "a",
    "the owl",
    "I'm",
    "Café",
    "naïve",
    "日本語",
    "🤗🤗",
    "x = 1",
    "    return",
    "\n\n",
    "\t",
    "  ",
    "1234567",
    "E=mc²",
    "…",
    "“quoted”",
    "<b>",
    "/usr/bin",
    "HTTPServer",
    "one,two",
    "?!",
    "Ελλάδα",
    "fin.",
    "-",
    "ß",
    "İ",
    "ﬁ",
    "",
]
CONTROL = [
    "<|user|>\n",
    "<|end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<unk>",
    "<UNK>",
    "<s>",
    "</s>",
    "|ENDOFTEXT|",
    "<0x0A>",
    "  <|assistant|>  ",
]


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
    words = WORDS if rng.random() < 0.7 else [*WORDS, *CONTROL * 2]
    return rng.choice(["", " "]).join(
        rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(0, 9))
    )


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
        options["truncation"] = rng.choice(
            [
                True,
                "longest_first",
                False,
                *(["only_first", "only_second"] if paired and len(args) == 2 else ["only_first"]),
            ]
        )
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


def test_a_call_gives_what_transformers_gives(pair):
    """Some ten thousand calls over all tokenizers: batches, pairs, padding, truncation, windows, places."""
    ours, theirs = pair
    rng = random.Random(0)
    for _ in range(720):
        args, options = a_call(rng, offsets=True)
        assert called(ours, args, options) == called(theirs, args, options), (args, options)


ADDED = ["zzqq", "Zork", "the", "foo", " foo", "é", "New York", "<call>", "▁owl", "own", "日本"]


@pytest.mark.parametrize("name", FOLDERS + TINY)
def test_added_tokens_give_what_transformers_gives(name):
    """Words are found in normalized text, a piece of the vocabulary keeps its id and counts."""
    for seed in range(8):
        rng = random.Random(seed)
        theirs = transformers.AutoTokenizer.from_pretrained(folder_of(name))
        ours = hf.AutoTokenizer.from_pretrained(folder_of(name))
        for _ in range(rng.randint(1, 4)):
            content, special = rng.choice(ADDED), rng.random() < 0.4
            flags = {flag: rng.random() < 0.3 for flag in ("lstrip", "rstrip", "single_word")}
            flags["normalized"] = rng.random() < 0.5
            as_text = rng.random() < 0.6
            counts = [
                tokenizer.add_tokens([content if as_text else kind(content, **flags)], special_tokens=special)
                for tokenizer, kind in ((ours, hf.AddedToken), (theirs, transformers.AddedToken))
            ]
            assert counts[0] == counts[1] and len(ours) == len(theirs), (content, special, flags, as_text)
        for _ in range(8):
            words = [rng.choice([*ADDED, *WORDS]) for _ in range(rng.randint(1, 7))]
            text = rng.choice(["", " "]).join(words)
            options = {"return_offsets_mapping": True}
            assert called(ours, (text,), options) == called(theirs, (text,), options), (seed, text, ours)


@pytest.mark.parametrize("name", FOLDERS + TINY)
def test_split_special_tokens_gives_what_transformers_gives(name):
    rng = random.Random(1)
    for at_load in (True, False):
        load = {"split_special_tokens": True} if at_load else {}
        call = {} if at_load else {"split_special_tokens": True}
        theirs = transformers.AutoTokenizer.from_pretrained(folder_of(name), **load)
        ours = hf.AutoTokenizer.from_pretrained(folder_of(name), **load)
        for _ in range(60):
            text = "".join(rng.choice([*CONTROL, *WORDS]) for _ in range(5))
            options = {"return_offsets_mapping": True, **call}
            assert called(ours, (text,), options) == called(theirs, (text,), options), text


def test_decoding_gives_what_transformers_gives(pair):
    ours, theirs = pair
    rng = random.Random(2)
    for _ in range(150):
        ids = ours(a_text(rng))["input_ids"] + [rng.randrange(len(ours)) for _ in range(rng.randint(0, 5))]
        for skip in (False, True):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            assert ours.decode(ids, **options) == theirs.decode(ids, **options), ids
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.batch_decode([ids, ids[:1]]) == [ours.decode(ids), ours.decode(ids[:1])]
    known = [token for token in ours.convert_ids_to_tokens(range(0, len(ours), 37)) if token is not None]
    assert ours.convert_tokens_to_ids(known) == theirs.convert_tokens_to_ids(known)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert theirs.unk_token_id in (
        ours.unk_token_id,
        None,
    )  # phi-4's class of 4.x has one, that of 5.x has none
    assert ours.vocab_size == theirs.vocab_size and ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize(
    "name", ["phi-3-mini-4k", "openai-gpt", "gpt-neo-125m", "tiny-phi3", "tiny-openai-gpt", "tiny-gpt-neo"]
)
def test_words_give_what_transformers_gives(name):
    options = {"add_prefix_space": True} if "neo" in name else {}
    theirs = transformers.AutoTokenizer.from_pretrained(folder_of(name), **options)
    ours = hf.AutoTokenizer.from_pretrained(folder_of(name), **options)
    rng = random.Random(3)
    for _ in range(100):
        rows = [list(a_text(rng).split() or ["a"]) for _ in range(3)]
        more = {"is_split_into_words": True, "max_length": 9, "truncation": True}
        assert called(ours, (rows[0],), more) == called(theirs, (rows[0],), more), rows
        assert called(ours, (rows,), more) == called(theirs, (rows,), more), rows


@pytest.mark.parametrize("name", ["phi-3-mini-4k", "phi-3.5-mini", "phi-4", "phi-4-mini"])
def test_conversations_give_what_transformers_gives(name):
    ours, theirs = (
        hf.AutoTokenizer.from_pretrained(folder_of(name)),
        transformers.AutoTokenizer.from_pretrained(folder_of(name)),
    )
    tools = json.dumps([{"name": "weather", "parameters": {"city": "text"}}])
    talks = [
        [{"role": "user", "content": "Hello"}],
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": " Who\n?"},
            {"role": "assistant", "content": "I."},
        ],
        [
            {"role": "system", "content": "Use these.", "tools": tools},
            {"role": "user", "content": "Rain in Oslo?"},
        ],
    ]
    for talk in talks:
        for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
            if "continue_final_message" in options and talk[-1]["role"] != "assistant":
                continue
            assert ours.apply_chat_template(talk, tokenize=False, **options) == theirs.apply_chat_template(
                talk, tokenize=False, **options
            )
            assert ours.apply_chat_template(talk, **options) == theirs.apply_chat_template(
                talk, return_dict=False, **options
            )
    batch = ours.apply_chat_template(
        talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert batch["input_ids"].shape == batch["attention_mask"].shape and len(batch["input_ids"]) == 3
