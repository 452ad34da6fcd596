"""Random documented settings of `generate`, over the six families: python -m tests.fuzz.settings --cases 1000 --seed 3

A case is told by its seed and number alone. What is checked of each, as far as it applies:

- with a KV cache as without, with a prompt in chunks as in one piece, and from a cache of the prompt's beginning
- a sequence of a batch as the sequence alone, whatever stands in its padding
- embeddings of the prompt as its ids
- with drafts as without
- by `kernels.prepare` as by PyTorch's own operators
- as Transformers, where it can do the same and is right
- nothing of what was given is changed, and what cannot be is refused in one sentence

Where two tokens are as good as equal, rounding decides: texts that differ are the same if noise of 3e-5 in the
logits turns one into the other.
"""

import argparse
import copy
import functools
import random
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from decoders import decoding, kernels
from decoders.decoding import beams
from decoders.kernels import native
from tests import sampled_beams
from tests.families import FAMILIES, LONGROPE, PHI3, Family

VOCABULARY = 101
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 14}
NOISE, TRIES = 3e-5, 6


@dataclass
class Case:
    """One call. `ids` are rows of one length, `padding` how many tokens of each are padding."""

    family: str
    changes: dict[str, Any]
    ids: list[list[int]]
    padding: list[int]
    embeddings: bool
    strategy: str
    options: dict[str, Any] = field(default_factory=dict)
    negative: list[list[int]] | None = None
    wrong: str | None = None  # the option that must be refused, or "NaN": weights that are
    checks: tuple[str, ...] = ()

    @property
    def changing(self) -> bool:
        """Whether frequencies follow from the longest sequence."""
        return bool(self.changes)


def embedding_of(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))


# ---- Drawing -----------------------------------------------------------------------------------------------


def draw(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed} {number}")
    family = rng.choice(FAMILIES)
    strategy = rng.choice(list(STRATEGIES))
    one = strategy in ("lookup", "assistant")
    changes = draw_changes(rng, family)
    B, T = 1 if one else rng.randint(1, 3), rng.randint(7 if changes else 1, 16)
    ids = [[rng.randrange(VOCABULARY) for _ in range(T)] for _ in range(B)]
    if rng.random() < 0.3:  # repeats itself
        ids = [(row[: max(1, T // 3)] * T)[:T] for row in ids]
    padding = [rng.randrange(T) if rng.random() < 0.5 else 0 for _ in range(B)]
    embeddings = rng.random() < 0.2 and strategy != "assistant"  # which reads ids alone
    case = Case(family.name, changes, ids, padding, embeddings, strategy)
    case.options = {**draw_common(rng, T), **STRATEGIES[strategy](rng), **draw_processors(rng)}
    if strategy in ("greedy", "sample", "beams", "beam sample") and rng.random() < 0.25:
        case.options["guidance_scale"] = rng.choice((0.5, 1.5, 3.0))
        if rng.random() < 0.7:
            n = rng.randint(1, 9)
            case.negative = [[rng.randrange(VOCABULARY) for _ in range(n)] for _ in range(B)]
    case.checks = tuple(rng.sample(list(CHECKS), 4)) + (("without drafts",) if one else ())
    if rng.random() < 0.05:
        return with_wrong_id(rng, case)
    if rng.random() < 0.02 and "remove_invalid_values" not in case.options:
        return replace(case, wrong="NaN")
    return case


def draw_changes(rng: random.Random, family: Family) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {}
    if family is PHI3:
        return LONGROPE  # whose limit is 12
    return DYNAMIC if family.name in ("phi", "persimmon") else {}


def draw_common(rng: random.Random, T: int) -> dict[str, Any]:
    stops = [None, rng.randrange(VOCABULARY)] + 2 * [rng.sample(range(VOCABULARY), rng.randint(1, 50))]
    options: dict[str, Any] = {
        "eos_token_id": rng.choice(stops),
        "pad_token_id": rng.randint(1, VOCABULARY - 1),
    }
    new = rng.randint(1, 9)
    options |= {"max_new_tokens": new} if rng.random() < 0.8 else {"max_length": T + new}
    if rng.random() < 0.15:
        options["min_new_tokens"] = rng.randint(0, new)
    return options


def draw_processors(rng: random.Random) -> dict[str, Any]:
    """A few of the penalties, biases and bans."""
    few = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))]
    every: dict[str, Any] = {
        "repetition_penalty": rng.choice((0.3, 1.3, 3.0)),
        "no_repeat_ngram_size": rng.randint(1, 3),
        "bad_words_ids": [few[i : i + rng.randint(1, 3)] for i in range(0, len(few), 2)],
        "suppress_tokens": few,
        "begin_suppress_tokens": few,
        "sequence_bias": [
            [few[i : i + rng.randint(1, 2)], rng.uniform(-9, 9)] for i in range(0, len(few), 2)
        ],
        "exponential_decay_length_penalty": (rng.randint(0, 3), rng.uniform(1.0, 2.0)),
        "forced_eos_token_id": rng.randrange(VOCABULARY),
        "renormalize_logits": True,
        "remove_invalid_values": True,
    }
    if "sequence_bias" in every:  # one bias for each sequence
        every["sequence_bias"] = [
            list(pair) for pair in {tuple(ids): (ids, b) for ids, b in every["sequence_bias"]}.values()
        ]
    names = [name for name in every if rng.random() < 0.12]
    return {name: every[name] for name in names}


def draw_filters(rng: random.Random) -> dict[str, Any]:
    every = {
        "temperature": rng.uniform(0.3, 2.0),
        "top_k": rng.choice((0, 1, 2, 10)),
        "top_p": rng.choice((1e-6, 0.5, 0.9)),
        "min_p": rng.choice((0.1, 0.9)),
        "typical_p": rng.choice((1e-6, 0.6)),
        "epsilon_cutoff": rng.choice((0.01, 0.5)),
        "eta_cutoff": rng.choice((0.02, 0.5)),
    }
    return {name: value for name, value in every.items() if rng.random() < 0.3}


def draw_beams(rng: random.Random) -> dict[str, Any]:
    N = rng.randint(2, 4)
    options = {"num_beams": N, "num_return_sequences": rng.randint(1, N)}
    if rng.random() < 0.5:
        options["length_penalty"] = rng.choice((-1.0, 0.0, 0.5, 2.0))
    if rng.random() < 0.5:
        options["early_stopping"] = rng.choice((True, False, "never"))
    return options


def draw_constraints(rng: random.Random) -> dict[str, Any]:
    phrase = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 2))]
    either = [[rng.randrange(50)], [rng.randrange(50, 99), 5]]
    return {
        "num_beams": rng.randint(2, 4),
        "force_words_ids": rng.choice(([phrase], [either])),
        "max_new_tokens": 6,
    }


def draw_sampling(rng: random.Random) -> dict[str, Any]:
    return {"do_sample": True, "num_return_sequences": rng.choice((1, 1, 2)), **draw_filters(rng)}


def draw_beam_sampling(rng: random.Random) -> dict[str, Any]:
    return {"do_sample": True, **draw_filters(rng), **draw_beams(rng)}


STRATEGIES = {
    "greedy": lambda rng: {},
    "sample": draw_sampling,
    "beams": draw_beams,
    "beam sample": draw_beam_sampling,
    "groups": lambda rng: {"num_beams": 4, "num_beam_groups": rng.choice((2, 4)), "diversity_penalty": rng.uniform(0.1, 3.0)},
    "constraints": draw_constraints,
    "contrastive": lambda rng: {"penalty_alpha": rng.uniform(0.1, 0.9), "top_k": rng.randint(2, 5)},
    "dola": lambda rng: {"dola_layers": rng.choice(("low", "high", [0, 1]))},
    "lookup": lambda rng: {"prompt_lookup_num_tokens": rng.randint(1, 5), "max_matching_ngram_size": rng.randint(1, 3)},
    "assistant": lambda rng: {"assistant_model": "seed 1", "num_assistant_tokens": rng.randint(1, 5),
                              "assistant_confidence_threshold": rng.choice((0.0, 0.4))},
}  # fmt: skip


def with_wrong_id(rng: random.Random, case: Case) -> Case:
    """An id outside the vocabulary somewhere."""
    id = rng.choice((-1, -VOCABULARY, VOCABULARY, 10**6))
    every: dict[str, Any] = {
        "suppress_tokens": [5, id],
        "begin_suppress_tokens": [id],
        "bad_words_ids": [[5, id]],
        "sequence_bias": [[[id, 5], 1.0]],
        "forced_eos_token_id": id,
        "eos_token_id": id,
        "pad_token_id": id,
    }
    wrong = rng.choice(list(every))
    return replace(case, options={**case.options, wrong: every[wrong]}, wrong=wrong)


# ---- Running -----------------------------------------------------------------------------------------------


@functools.cache
def models(name: str, changed: bool) -> dict[str, Any]:
    """Ours, plain and prepared, an assistant, and Transformers' with the same weights."""
    family = next(family for family in FAMILIES if family.name == name)
    changes = {} if not changed else LONGROPE if family is PHI3 else DYNAMIC
    ours, theirs = family.pair(**changes)
    prepared = kernels.prepare(copy.deepcopy(ours))
    broken = copy.deepcopy(ours)
    with torch.no_grad():
        next(module.lm_head for module in broken.modules() if hasattr(module, "lm_head")).weight[7] = (
            torch.nan
        )
    assistant = family.model(seed=1, **changes)
    return {"plain": ours, "prepared": prepared, "NaN": broken, "theirs": theirs, "assistant": assistant}


def models_of(case: Case) -> dict[str, Any]:
    return models(case.family, case.changing)


def tensors(case: Case) -> dict[str, Any]:
    """Arguments of `generate` that are tensors."""
    ids = torch.tensor(case.ids)
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(case.padding)[:, None]).long()
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask if any(case.padding) else None}
    if case.embeddings:
        given = {
            **given,
            "input_ids": None,
            "inputs_embeds": embedding_of(models_of(case)["plain"])(ids).detach(),
        }
    if case.negative is not None:
        given["negative_prompt_ids"] = torch.tensor(case.negative)
    return given


def run(case: Case, which: str = "plain", noise: int | None = None, **more: Any) -> list[list[int]]:
    """New ids of each sequence."""
    given, options = tensors(case), {**case.options, **more}
    if "assistant_model" in options:
        options["assistant_model"] = models_of(case)["assistant"]
    if noise is not None:
        options["logits_processor"] = [noisy(noise)]
    torch.manual_seed(7)
    copies = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    found = decoding.generate(models_of(case)[which], **given, **options)
    for name, value in copies.items():
        assert torch.equal(given[name], value), f"{name} was changed"
    return found[:, 0 if given["input_ids"] is None else len(case.ids[0]) :].tolist()


def noisy(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda ids, scores: scores + NOISE * torch.randn(scores.shape, generator=generator)


def theirs(case: Case) -> list[list[int]]:
    given, options = tensors(case), dict(case.options)
    if given["attention_mask"] is None:
        given["attention_mask"] = torch.ones(len(case.ids), len(case.ids[0]), dtype=torch.long)
    torch.manual_seed(7)
    found = models_of(case)["theirs"].generate(given.pop("input_ids"), **given, **options)
    return found[:, 0 if case.embeddings else len(case.ids[0]) :].tolist()


# ---- Checking ----------------------------------------------------------------------------------------------


def trimmed(rows: list[list[int]], pad: int) -> list[list[int]]:
    """Without the padding that follows."""
    found = []
    for row in rows:
        while row and row[-1] == pad:
            row = row[:-1]
        found.append(row)
    return found


def uncached(case: Case) -> Any:
    if case.strategy != "contrastive":
        return run(case, use_cache=False)
    return None


def in_chunks(case: Case) -> Any:
    if case.embeddings or case.strategy == "dola":
        return None
    return run(case, prefill_chunk_size=1 + len(case.ids[0]) // 3)


def continued(case: Case) -> Any:
    """From a cache of the prompt's beginning, which `generate` fills."""
    T = len(case.ids[0])
    if T < 3 or case.changing or any(case.padding):
        return None
    model = models_of(case)["plain"]
    cache = model(torch.tensor(case.ids)[:, : T // 2], use_cache=True).past_key_values
    return run(case, past_key_values=cache)


def prepared(case: Case) -> Any:
    return run(case, "prepared")


def other_padding(case: Case) -> Any:
    """With other tokens where padding is."""
    if not any(case.padding):
        return None
    ids = [
        [(7 * i + 1) % VOCABULARY for i in range(n)] + row[n:]
        for row, n in zip(case.ids, case.padding, strict=True)
    ]
    return run(replace(case, ids=ids))


def by_ids(case: Case) -> Any:
    """Embeddings beside ids, which penalties see, as ids alone."""
    if case.embeddings or case.strategy == "assistant":
        return None
    vectors = embedding_of(models_of(case)["plain"])(torch.tensor(case.ids)).detach()
    return run(case, inputs_embeds=vectors)


def alone(case: Case) -> Any:
    """The sequences of each prompt by itself."""
    depends_on_others = case.options.get("do_sample") or (case.changing and any(case.padding))
    if len(case.ids) == 1 and not any(case.padding) or depends_on_others or "max_length" in case.options:
        return None
    found = []
    for i, n in enumerate(case.padding):
        negative = None if case.negative is None else [case.negative[i]]
        found += run(replace(case, ids=[case.ids[i][n:]], padding=[0], negative=negative))
    return found


def without_drafts(case: Case) -> Any:
    """Greedy, a token at a time: drafts change the time that a text takes, not the text."""
    drafting = ("prompt_lookup", "max_matching", "assistant", "num_assistant")
    options = {key: value for key, value in case.options.items() if not key.startswith(drafting)}
    return run(replace(case, options=options))


def embeddings_are_right_there(case: Case) -> bool:
    """Not in GPT-1, which has none; nor where their length or their padding counts."""
    counted = {"no_repeat_ngram_size", "max_length"} | (
        {"repetition_penalty"} if any(case.padding) else set()
    )
    return case.family != "openai-gpt" and not case.changing and not counted & case.options.keys()


def crosses_without_the_prompt(case: Case, new: int) -> bool:
    """Whether the negative prompt, or without one the last token alone, grows past longrope's limit."""
    limit = case.changes.get("original_max_position_embeddings", 0)
    return any(len(ids) <= limit < len(ids) + new for ids in case.negative or [[0]])


def transformers(case: Case) -> Any:
    """What 5.x still has, and gets right."""
    options, padded = case.options, any(case.padding)
    if case.strategy not in ("greedy", "sample", "beams", "beam sample") or case.wrong:
        return None
    if "guidance_scale" in options and (case.family == "openai-gpt" or "num_beams" in options or padded):
        return None  # no cache there; a cache that stays behind; positions of padding
    if "guidance_scale" in options and (case.embeddings or options.get("num_return_sequences", 1) > 1):
        return None
    if case.embeddings and not embeddings_are_right_there(case):
        return None
    if padded and (
        case.changing or {"no_repeat_ngram_size", "sequence_bias", "bad_words_ids"} & options.keys()
    ):
        return None  # where padding counts
    if case.changing and case.family != "phi3":
        return None  # frequencies of the prompt stay with the cache
    if case.strategy == "beam sample" and "forced_eos_token_id" in options:
        return None  # of one token more are sampled
    new = options.get("max_new_tokens", options.get("max_length", 0) - len(case.ids[0]))
    if "guidance_scale" in options and crosses_without_the_prompt(case, new):
        return None  # there the negative prompt's cache keeps its frequencies
    few = case.strategy == "beam sample" or "forced_eos_token_id" in options
    if new == 1 and few and options.get("num_return_sequences", 1) > 1:
        return None  # more is asked for than there may be
    try:
        return theirs(case)
    except Exception:  # their crash
        return None


CHECKS = {
    "uncached": uncached,
    "in chunks": in_chunks,
    "continued": continued,
    "prepared": prepared,
    "other padding": other_padding,
    "by ids": by_ids,
    "alone": alone,
    "transformers": transformers,
}
CHECKS_OF_DRAFTS = {"without drafts": without_drafts}


def check(case: Case) -> tuple[str, str]:
    """("answered", "refused", "rounded" or "failed", what is wrong)."""
    try:
        expected = run(case, "NaN" if case.wrong == "NaN" else "plain")
    except ValueError as error:
        one_line = "\n" not in str(error) and len(str(error)) > 10
        named = case.wrong is None or case.wrong in str(error)
        return ("refused", "") if one_line and named else ("failed", f"refused by {error!r}")
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    if case.wrong:
        return "failed", f"{case.wrong} {case.options.get(case.wrong)} was taken"
    kind, pad = "answered", case.options["pad_token_id"]
    for name in case.checks:
        try:
            found = (CHECKS | CHECKS_OF_DRAFTS)[name](case)
        except Exception as error:
            return "failed", f"{name}: {type(error).__name__}: {str(error)[:200]}"
        if found is None or trimmed(found, pad) == trimmed(expected, pad):
            continue
        if not is_rounding(case, trimmed(found, pad)):
            return "failed", f"{name}: {found}, not {expected}"
        kind = "rounded"
    return kind, ""


def is_rounding(case: Case, found: list[list[int]]) -> bool:
    for noise in range(TRIES):
        try:
            if trimmed(run(case, noise=noise), case.options["pad_token_id"]) == found:
                return True
        except ValueError:  # a processor of one's own may not leave nothing
            return False
    return False


def shrunk(case: Case, number_of: str) -> Case:
    """The same fault with fewer options and rows."""

    def fails(other: Case) -> bool:
        kind, message = check(other)
        return kind == "failed" and message.split(":")[0] == number_of.split(":")[0]

    for name in list(case.options):
        options = {key: value for key, value in case.options.items() if key != name}
        if name not in ("max_new_tokens", "max_length", "pad_token_id") and fails(
            replace(case, options=options)
        ):
            case = replace(case, options=options)
    return case


def run_cases(cases: int, seed: int, first: int = 0, most: int = 20) -> tuple[Counter, list[str]]:
    """How many ended how, and what failed, as lines of code, `most` of them."""
    native.wait()
    order = beams.best_first if sampled_beams.are_sorted() else sampled_beams.as_drawn
    counts: Counter = Counter()
    failures: list[str] = []
    with mock.patch.object(beams, "best_first", order), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Transformers
        for number in range(first, first + cases):
            case = draw(seed, number)
            kind, message = check(case)
            counts[kind] += 1
            if kind == "failed":
                failures.append(f"    {shrunk(case, message)},  # seed {seed}, number {number}: {message}")
            if len(failures) == most:
                break
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, failures = run_cases(args.cases, args.seed, args.first)
    print(", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())), f"(seed {args.seed})")
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
