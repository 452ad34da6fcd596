"""Documented calls of `decoders.hf` at random, with odd values among them: python -m tests.fuzz.calls --cases 200 --seed 3

- hf forward: any documented arguments; the numbers of the readable file's own pass, shapes as documented, and the
  same again
- hf generate: any documented settings; the ids of the readable file's own `generate`, and the same again
- hf tokenizers: any texts and documented arguments; the ids of `decoders.tokenize`, in rows of one length where
  that is asked for, and the same as lists and as tensors
- cache folder: see `cache_folder.py`

An odd value is answered, or refused by a ValueError, TypeError or OSError of one line.
"""

import functools
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decoders import decoding, hf, weights
from tests.fuzz import uses
from tests.fuzz.budget import arguments
from tests.fuzz.cache_folder import cache_folder
from tests.fuzz.folders import CHECKPOINTS
from tests.fuzz.uses import Failed, refusal, text_of

FAMILIES = ("tiny-phi", "tiny-phi3", "tiny-persimmon", "tiny-fuyu", "tiny-gpt-neo", "tiny-openai-gpt")
REFUSED = (ValueError, TypeError, OSError)
CLOSE = {"atol": 1e-4, "rtol": 1e-4, "equal_nan": True}  # the loss of no label is NaN
VOCABULARY = 600  # ids that every family has


@functools.cache
def model(name: str) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, torch_dtype=torch.float32).eval()


@functools.cache
def plain_model(name: str) -> Any:
    """The same by the class of the readable file, loaded without `decoders.hf`."""
    kind = type(model(name)).plain_class
    return weights.load(kind, CHECKPOINTS / name, dtype=torch.float32).eval()


@functools.cache
def tokenizer(name: str) -> Any:
    return hf.AutoTokenizer.from_pretrained(CHECKPOINTS / name)


def some(rng: random.Random, every: dict[str, Any], chance: float) -> dict[str, Any]:
    return {name: value for name, value in every.items() if rng.random() < chance}


def random_ids(rng: random.Random, B: int, T: int) -> Tensor:
    return torch.tensor([[rng.randrange(5, VOCABULARY) for _ in range(T)] for _ in range(B)])


def padded_mask(rng: random.Random, B: int, T: int) -> Tensor:
    """Left padding; each sequence keeps one token at least."""
    lengths = torch.tensor([[rng.randint(1, T)] for _ in range(B)])
    return (torch.arange(T) >= T - lengths).long()


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """("answered", what came) or ("refused", None)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "answered", call()
    except REFUSED as error:
        return refusal(error), None


def agree(a: Any, b: Any, what: str) -> None:
    """Tensors, or nested tuples of them. Failed where they differ."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
        for one, other in zip(a, b, strict=True):
            agree(one, other, what)
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or not torch.allclose(a.float(), b.float(), **CLOSE):
            raise Failed(f"{what} differ")
    elif a is not None or b is not None:
        raise Failed(f"{what}: {type(a).__name__} of one, {type(b).__name__} of the other")


# ---- Forward -------------------------------------------------------------------------------------------------


def forward(rng: random.Random) -> str:
    """documented arguments of `forward` over the six families, odd values among them: as the readable file's pass,
    twice the same, shapes as documented"""
    name, B, T = rng.choice(FAMILIES), rng.randint(1, 3), rng.randint(1, 9)
    ids = random_ids(rng, B, T)
    given = {"input_ids": ids, **some(rng, draw_inputs(rng, ids), 0.3)}
    if "labels" in given:  # of which each needs its logits
        given.pop("logits_to_keep", None)
    if rng.random() < 0.2:
        given["inputs_embeds"] = model(name).get_input_embeddings()(given.pop("input_ids"))
    shown = some(rng, {"return_dict": rng.random() < 0.5}, 0.3)
    odd = rng.random() < 0.4
    if odd:
        given[rng.choice(sorted(given) if rng.random() < 0.4 else ODD_NAMES)] = odd_value(rng, ids)
    with torch.no_grad():
        result, output = outcome(lambda: model(name)(**given, **shown))
        if result == "refused" and not odd:
            raise Failed(f"{name}: documented arguments are refused: {sorted(given)}")
        if output is None:
            return result
        parts = output if isinstance(output, tuple) else output.to_tuple()
        again = model(name)(**given, return_dict=False)
        agree(without_cache(parts), without_cache(again), f"{name}: two passes with {sorted(given)}")
        if not odd:
            check_pass(name, given, model(name)(**given, return_dict=True), B, T)
    return result


ODD_NAMES = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache",
             "output_attentions", "logits_to_keep", "input_id", "head_masks")  # fmt: skip


def draw_inputs(rng: random.Random, ids: Tensor) -> dict[str, Any]:
    B, T = ids.shape
    labels = ids.clone()
    labels[:, : rng.randrange(T)] = -100
    return {
        "attention_mask": padded_mask(rng, B, T),
        "position_ids": torch.arange(T).expand(B, T) + rng.randint(0, 9),
        "labels": labels,
        "use_cache": rng.random() < 0.5,
        "output_attentions": rng.random() < 0.7,
        "output_hidden_states": rng.random() < 0.7,
        "logits_to_keep": rng.choice((0, 1, T, torch.tensor([T - 1]))),
    }


def odd_value(rng: random.Random, ids: Tensor) -> Any:
    """Of another type, shape or range."""
    return rng.choice((None, ids.tolist(), ids.float(), -ids, ids + 10**6, ids[:, :0], ids[0], ids[None], ids[:, :-1], ids.bool(),
                       ids.int(), ids.expand(5, *ids.shape)[0], torch.cat([ids, ids]), torch.cat([ids, ids], 1), "x", "", 5, -1, 0.5, [], [[]],
                       {}, object, True, torch.tensor(3), torch.tensor([]), (), ((),), torch.randn(*ids.shape, 3)))  # fmt: skip


def without_cache(parts: tuple) -> list[Any]:
    """Losses, logits, hidden states and attention weights, without the cache."""
    return [part for part in parts if isinstance(part, Tensor) or (isinstance(part, tuple) and part and isinstance(part[0], Tensor))]  # fmt: skip


def check_pass(name: str, given: dict, output: Any, B: int, T: int) -> None:
    """As the readable file's, and of the documented shapes."""
    expected = plain_model(name)(**{"use_cache": False, **given})
    for part in ("logits", "loss", "hidden_states", "attentions"):
        agree(getattr(output, part), getattr(expected, part), f"{name}: {part} with {sorted(given)}")
    config = model(name).config
    kept = given.get("logits_to_keep", 0)
    rows = (kept or T) if isinstance(kept, int) else len(kept)
    if output.logits.shape != (B, rows, expected.logits.shape[-1]):
        raise Failed(f"{name}: logits {tuple(output.logits.shape)} with logits_to_keep={kept}")
    states = output.hidden_states if given.get("output_hidden_states") else ()
    if states and {tuple(x.shape) for x in states} != {(B, T, config.hidden_size)}:
        raise Failed(f"{name}: shapes of hidden_states")
    if states and len(states) != config.num_hidden_layers + 1:
        raise Failed(f"{name}: {len(states)} hidden_states")
    weighed = output.attentions if given.get("output_attentions") else ()
    if weighed and {tuple(x.shape) for x in weighed} != {(B, config.num_attention_heads, T, T)}:
        raise Failed(f"{name}: shapes of attentions")
    if given.get("use_cache") is False and output.past_key_values is not None:
        raise Failed(f"{name}: a cache with use_cache=False")


# ---- Generate ------------------------------------------------------------------------------------------------


def generate(rng: random.Random) -> str:
    """documented settings of `generate` over the six families, odd values among them: as the readable file's own,
    twice the same"""
    name, B, T = rng.choice(FAMILIES), rng.randint(1, 2), rng.randint(1, 7)
    ids = random_ids(rng, B, T)
    given: dict[str, Any] = {"input_ids": ids, "max_new_tokens": rng.randint(1, 4)}
    given |= some(rng, draw_settings(rng, B, T), 0.2)
    odd = rng.random() < 0.5
    if odd:
        setting = rng.choice(
            (*given, *draw_settings(rng, B, T), "max_new_token", "streamer", "past_key_values")
        )
        given[setting] = odd_value(rng, ids)
    with torch.random.fork_rng(devices=[]):
        result, found = outcome(lambda: seeded(model(name), given))
        if result == "refused" and not odd:
            raise Failed(f"{name}: documented settings are refused: {given}")
        if found is None:
            return result
        agree(sequences(found), sequences(seeded(model(name), given)), f"{name}: two calls with {given}")
        if not odd:
            plain = plain_model(name)
            agree(sequences(found), sequences(seeded_plain(plain, given)), f"{name}: sequences with {given}")
            check_sequences(sequences(found), given)
    return result


def draw_settings(rng: random.Random, B: int, T: int) -> dict[str, Any]:
    """Any of these together are allowed."""
    return {
        "attention_mask": padded_mask(rng, B, T),
        "do_sample": rng.random() < 0.7,
        "num_beams": rng.randint(1, 3),
        "top_k": rng.choice((1, 5, 50)),
        "top_p": rng.choice((0.3, 0.9, 1.0)),
        "temperature": rng.choice((0.5, 1.0, 2.0)),
        "repetition_penalty": rng.choice((0.8, 1.2)),
        "no_repeat_ngram_size": rng.randint(0, 3),
        "eos_token_id": rng.choice((None, 7, [7, 8])),
        "pad_token_id": rng.randrange(5),
        "use_cache": rng.random() < 0.5,
        "return_dict_in_generate": rng.random() < 0.5,
        "output_scores": rng.random() < 0.5,
        "suppress_tokens": [rng.randrange(VOCABULARY)],
        "bad_words_ids": [[rng.randrange(VOCABULARY)]],
        "min_new_tokens": 1,
    }


def seeded(model: Any, given: dict) -> Any:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**given)


def seeded_plain(model: Any, given: dict) -> Any:
    torch.manual_seed(3)
    others = {name: value for name, value in given.items() if name != "input_ids"}
    return decoding.generate(model, given["input_ids"], **others)


def sequences(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sequences


def check_sequences(found: Tensor, given: dict) -> None:
    """The prompt, and not more than was asked for."""
    ids = given["input_ids"]
    B, T = ids.shape
    if found.shape[0] != B or not T < found.shape[1] <= T + given["max_new_tokens"]:
        raise Failed(f"{tuple(found.shape)} of a prompt {tuple(ids.shape)}: {given}")
    if not torch.equal(found[:, :T], ids):
        raise Failed(f"the prompt is not what it was: {given}")


# ---- Tokenizers ----------------------------------------------------------------------------------------------


def tokenizers(rng: random.Random) -> str:
    """texts and documented arguments of the tokenizers of the six families, odd values among them: the ids of
    `decoders.tokenize`, and the same alone, in a batch, as lists and as tensors"""
    name = rng.choice(FAMILIES)
    own, texts = tokenizer(name), [text_of(rng) for _ in range(rng.randint(1, 4))]
    given = some(rng, draw_arguments(rng), 0.3)
    odd = rng.random() < 0.4
    if odd:
        odd_name = rng.choice((*draw_arguments(rng), "text", "text_pair", "return_tensors", "paddings"))
        given[odd_name] = odd_text(rng)
    first = {"text": texts, **given} if odd or given.get("padding") else {"text": texts[0], **given}
    result, found = outcome(lambda: own(**first))
    if found is None:
        return result
    if dict(own(**first)).keys() != dict(found).keys():
        raise Failed(f"{name}: other columns the second time with {given}")
    if not odd:
        rows = found["input_ids"] if isinstance(first["text"], list) else [found["input_ids"]]
        check_rows(name, rows, texts, given)
        back = own.decode(rows[0])
        if back != own.decode(torch.tensor(rows[0], dtype=torch.long)):
            raise Failed(f"{name}: another text of ids as a tensor")
    odd_ids = rng.choice((odd_text(rng), [rng.choice((-1, 5, 10**6))], []))
    outcome(lambda: own.decode(odd_ids))
    outcome(lambda: own.convert_ids_to_tokens(odd_ids))
    outcome(lambda: own.convert_tokens_to_ids(odd_ids))
    return result


def draw_arguments(rng: random.Random) -> dict[str, Any]:
    return {
        "add_special_tokens": rng.random() < 0.5,
        "padding": rng.choice((False, True, "longest")),
        "truncation": rng.choice((True, "longest_first", "only_first")),
        "max_length": rng.randint(2, 12),
        "pad_to_multiple_of": rng.choice((1, 4)),
        "padding_side": rng.choice(("left", "right")),
        "return_attention_mask": rng.random() < 0.5,
        "return_special_tokens_mask": True,
        "return_offsets_mapping": True,
        "return_token_type_ids": True,
        "return_length": True,
    }


def odd_text(rng: random.Random) -> Any:
    return rng.choice((None, "", "x", 5, -1, 0, 0.5, 10**30, [], [[]], [None], ["x", None], [["x"], "x"], [["a", "b"], ["c"]], [1, 2], [[1], [2, 3]],
                       [1.5], {}, b"x", object, True, float("nan"), torch.tensor([1]), torch.tensor([[1, 2]]), ("a", "b"), [("a", "b")], "pt", "tf"))  # fmt: skip


def check_rows(name: str, rows: list[list[int]], texts: list[str], given: dict) -> None:
    """Without what was padded these are the ids of the text, or their beginning or end."""
    own = tokenizer(name)
    lengths = {len(row) for row in rows}
    if given.get("padding") and len(lengths) > 1:
        raise Failed(f"{name}: rows of {lengths} tokens with {given}")
    cut = "truncation" in given or "max_length" in given
    for row, text in zip(rows, texts, strict=False):
        ids = own.plain.encode(text, add_special_tokens=given.get("add_special_tokens", True))
        if not cut and not (row == ids or (given.get("padding") and is_padded(row, ids, own.pad_token_id))):
            raise Failed(f"{name}: other ids of {text!r} with {given}")
        if given.get("truncation") and not given.get("padding") and len(row) > given.get("max_length", 10**9):
            raise Failed(f"{name}: {len(row)} tokens with {given}")


def is_padded(row: list[int], ids: list[int], pad: int | None) -> bool:
    n = len(row) - len(ids)
    return row in ([pad] * n + ids, ids + [pad] * n)


KINDS: dict[str, Callable[[random.Random], str]] = {
    "hf forward": forward, "hf generate": generate, "hf tokenizers": tokenizers, "cache folder": cache_folder,
}  # fmt: skip

if __name__ == "__main__":
    options = arguments(__doc__)
    torch.set_num_threads(1)
    every: list[str] = []
    for kind in KINDS:
        seconds = options.seconds and options.seconds / len(KINDS)
        totals, failed = uses.run(kind, options.seed, options.cases, seconds, KINDS)
        print(kind, totals)
        every += failed
    print("\n".join(every))
    sys.exit(bool(every))
