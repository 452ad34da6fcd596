"""Every way to decode, against Transformers on redrawn models: the same ids, scores within 2e-5."""

import json

import pytest
import torch

from decoders.tools import generation
from tests import golden_generation
from tests.families import LENGTH, inputs

EOS = [3, 17, 40, 77]  # several, so that texts of 101 tokens come to an end

GREEDY = {
    "greedy": {}, "min_length": {"min_length": LENGTH + 9}, "min_new_tokens": {"min_new_tokens": 7}, "max_length": {"max_new_tokens": None, "max_length": LENGTH + 6},
    "repetition_penalty": {"repetition_penalty": 2.5}, "repetition_penalty below 1": {"repetition_penalty": 0.4}, "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.2}, "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3, "repetition_penalty": 0.2},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(0, 101, 2)] + [[5, 7], [11, 13, 17]]}, "suppress_tokens": {"suppress_tokens": list(range(50))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(60))}, "forced_eos_token_id": {"forced_eos_token_id": 17, "min_new_tokens": 12},
    "sequence_bias": {"sequence_bias": [[[7], 3.0], [[7, 9], 9.0], [[9, 7], -2.0], [[7, 9, 11], 20.0]]},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 1.6)}, "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.3}, "guidance": {"guidance_scale": 1.7},
    "guidance with a negative prompt": {"guidance_scale": 2.5, "negative_prompt_ids": torch.tensor([[4, 9, 13, 2, 60], [8, 7, 6, 5, 4]])},
    "no cache": {"use_cache": False},
}  # fmt: skip
SAMPLING = {
    "plain": {"top_k": 0}, "defaults": {}, "temperature": {"temperature": 0.6}, "top_k": {"top_k": 7}, "top_p": {"top_p": 0.7, "top_k": 0}, "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6, "top_k": 0}, "epsilon_cutoff": {"epsilon_cutoff": 0.02}, "eta_cutoff": {"eta_cutoff": 0.05}, "all": {
        "temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "repetition_penalty": 1.2},
    "renormalize": {"renormalize_logits": True, "top_p": 0.8}, "three of each": {"num_return_sequences": 3},
}  # fmt: skip
BEAMS = {
    "two": {"num_beams": 2}, "four": {"num_beams": 4}, "seven": {"num_beams": 7, "num_return_sequences": 5}, "early": {"num_beams": 4, "early_stopping": True},
    "never": {"num_beams": 4, "early_stopping": "never"}, "long": {"num_beams": 4, "length_penalty": 2.0}, "never, long": {"num_beams": 4, "early_stopping": "never", "length_penalty": 1.7},
    "short": {"num_beams": 4, "length_penalty": -1.0}, "no penalty": {"num_beams": 4, "length_penalty": 0.0}, "all": {"num_beams": 4, "num_return_sequences": 4},
    "min_length": {"num_beams": 3, "min_length": LENGTH + 6}, "penalties": {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "forced": {"num_beams": 3, "forced_eos_token_id": 17}, "prefix": {"num_beams": 3, "prefix_allowed_tokens_fn": lambda text, ids: range(text, 101, 3)},
    "sampled": {"num_beams": 3, "do_sample": True, "top_k": 0}, "sampled, filters": {"num_beams": 3, "do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2},
}  # fmt: skip


def both(family, padded: bool, options: dict, compare: tuple[str, ...]) -> None:
    """The same ids, and what is to be compared within 2e-5."""
    ours, theirs = family.pair()
    ids, mask = inputs(101, padded=padded)
    options = {"max_new_tokens": 14, "eos_token_id": EOS, "pad_token_id": 1, **options}  # 5.23 fills beams with a stop id where pad is 0
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    torch.manual_seed(5)
    found = generation.generate(ours, ids, mask, **options, **wanted)
    torch.manual_seed(5)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options, **wanted)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for key in compare:
        a, b = getattr(found, key), getattr(expected, key)
        if key == "beam_indices":
            assert a.tolist() == b[:, : a.shape[1]].tolist()
            continue
        for x, y in zip(a, b, strict=True):
            infinite = x.isinf()
            assert torch.equal(infinite, y.isinf()) and ((x - y).abs() / y.abs().clamp(min=1))[~infinite].max() < 2e-5, key


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("what", GREEDY)
def test_greedy_equals_transformers(family, what, padded):
    both(family, padded, GREEDY[what], ("scores", "logits"))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("what", SAMPLING)
def test_sampling_draws_what_transformers_draws(family, what, padded):
    both(family, padded, {"do_sample": True, **SAMPLING[what]}, ("scores", "logits"))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("what", BEAMS)
def test_beams_equal_transformers(family, what, padded):
    both(family, padded, BEAMS[what], ("scores", "logits", "sequences_scores", "beam_indices"))


# ---- What newer versions have lost: Transformers 4.50.3, recorded

GOLDEN = json.loads(golden_generation.FILE.read_text())["results"]


def first_eos(rows: list[list[int]]) -> list[list[int]]:
    """4.50 writes the first stop id in the end of a beam, whichever it was."""
    return [[EOS[0] if id in EOS else id for id in row] for row in rows]


@pytest.mark.parametrize("what", golden_generation.calls())
def test_lost_strategies_equal_transformers_4_50(family, what):
    recorded = GOLDEN[family.name][what]
    if "error" in recorded:
        pytest.skip(f"Transformers 4.50.3: {recorded['error']}")
    options = golden_generation.calls()[what]
    found = generation.generate(family.model(), **options, return_dict_in_generate=True)
    assert first_eos(found.sequences[:, LENGTH:].tolist()) == first_eos(recorded["sequences"])
    if recorded["scores"] is not None:
        torch.testing.assert_close(found.sequences_scores, torch.tensor(recorded["scores"]), atol=2e-5, rtol=2e-5)
