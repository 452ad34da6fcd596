"""Every way to decode, against Transformers on redrawn models: the same ids, scores within 2e-5."""

import inspect
import json
import threading

import pytest
import torch

from decoders import decoding, fuyu, gpt_neo, kernels, tokenize, weights
from decoders.decoding.beams import BeamHypotheses, Hypothesis
from decoders.decoding.constraints import Beam, Progress, allocate
from tests import golden_generation
from tests.conftest import ROOT
from tests.families import GPT_NEO, LENGTH, LONGROPE, PADDED, PHI3, inputs
from tests.test_fuyu import picture
from tests.test_versions import other  # noqa: F401  (a fixture)

EOS = [3, 17, 40, 77]  # several, so that texts of 101 tokens come to an end
IDS = inputs(101)[0]

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
    **{f"many stops, {early}, {penalty}": {"num_beams": 4, "early_stopping": early, "length_penalty": penalty, "num_return_sequences": 4, "eos_token_id": list(range(0, 101, 4))}
       for early in (True, False, "never") for penalty in (0.5, 2.0)},
    "sampled": {"num_beams": 3, "do_sample": True, "top_k": 0}, "sampled, filters": {"num_beams": 3, "do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2},
}  # fmt: skip


def both(family, padded: bool, options: dict, compare: tuple[str, ...]) -> None:
    """The same ids, and what is to be compared within 2e-5."""
    if family.name == "openai-gpt" and "guidance_scale" in options:
        pytest.skip(
            "Transformers 5.23 feeds the negative prompt's last token alone: this family has no cache there"
        )
    ours, theirs = family.pair()
    ids, mask = inputs(101, padded=padded)
    options = {
        "max_new_tokens": 14,
        "eos_token_id": EOS,
        "pad_token_id": 1,
        **options,
    }  # 5.23 fills beams with a stop id where pad is 0
    if (n := options.get("no_repeat_ngram_size")) and padded:  # Transformers counts padding, and we do not:
        ids[0, :PADDED] = ids[0, -1] if n == 1 else 100  # seen anyway, or in no n-gram that comes again
        options |= {} if n == 1 else {"suppress_tokens": [100]}
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    torch.manual_seed(5)
    found = decoding.generate(ours, ids, mask, **options, **wanted)
    torch.manual_seed(5)
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options, **wanted
    )
    assert found.sequences.tolist() == expected.sequences.tolist()
    for key in compare:
        a, b = getattr(found, key), getattr(expected, key)
        if key == "beam_indices":
            assert a.tolist() == b[:, : a.shape[1]].tolist()
            continue
        for x, y in zip(a, b, strict=True):
            infinite = x.isinf()
            assert (
                torch.equal(infinite, y.isinf())
                and ((x - y).abs() / y.abs().clamp(min=1))[~infinite].max() < 2e-5
            ), key


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


# There a group that is full by an early stop in the very last step drops a beam that is better
EARLY = ("phi", "three groups, early, padded")


def first_eos(rows: list[list[int]]) -> list[list[int]]:
    """4.50 writes the first stop id in the end of a beam, whichever it was."""
    return [[EOS[0] if id in EOS else id for id in row] for row in rows]


def padding_was_seen(ids, scores):
    """4.50 bans what stands in the padding, too: in the first row."""
    return scores.index_put((torch.zeros(PADDED).long(), ids[0, :PADDED]), torch.tensor(-torch.inf))


@pytest.mark.parametrize("what", golden_generation.calls())
def test_lost_strategies_equal_transformers_4_50(family, what):
    recorded = GOLDEN[family.name][what]
    if "error" in recorded:
        pytest.skip(f"Transformers 4.50.3: {recorded['error']}")
    if family.name == "openai-gpt" and what.endswith("padded"):
        pytest.skip("Transformers 4.50.3 counts padding as positions in this family")
    options = golden_generation.calls()[what]
    if options.get("no_repeat_ngram_size") == 1 and what.endswith("padded"):
        options["logits_processor"] = [padding_was_seen]
    found = decoding.generate(family.model(), **options, return_dict_in_generate=True)
    if (family.name, what) == EARLY:
        scores = torch.tensor(recorded["scores"])
        assert (found.sequences_scores >= scores - 2e-5).all() and (
            found.sequences_scores > scores + 1e-3
        ).sum() == 1
        return
    assert first_eos(found.sequences[:, LENGTH:].tolist()) == first_eos(recorded["sequences"])
    if recorded["scores"] is not None:
        torch.testing.assert_close(
            found.sequences_scores, torch.tensor(recorded["scores"]), atol=2e-5, rtol=2e-5
        )


def test_the_recorded_is_what_4_50_says(family, other):  # noqa: F811
    """Run live where DECODERS_REFERENCES has that version."""
    given = golden_generation.calls()
    version, [found] = other([golden_generation.case_of(family, given)])
    if version != "4.50.3":
        pytest.skip(f"Transformers {version} is not 4.50.3")
    for name, one in zip(given, found, strict=True):
        assert [row[LENGTH:] for row in one.get("sequences", ())] == GOLDEN[family.name][name]["sequences"], (
            name
        )


# ---- What must hold whatever a reference says


def test_guidance_is_the_formula(family):
    """By two passes over whole texts, beams of both moved alike."""
    model, (ids, _) = family.model(), inputs(101)
    away_ids, scale = torch.tensor([[4, 9, 13, 2, 60], [8, 7, 6, 5, 4]]), 1.8
    found = decoding.generate(
        model, ids, negative_prompt_ids=away_ids, guidance_scale=scale, max_new_tokens=9, eos_token_id=None
    )
    for _ in range(9):
        own, away = (model(rows).logits[:, -1].log_softmax(-1) for rows in (ids, away_ids))
        new = (away + scale * (own - away)).argmax(-1, keepdim=True)
        ids, away_ids = torch.cat([ids, new], 1), torch.cat([away_ids, new], 1)
    assert found.tolist() == ids.tolist()


def log_chances(model, ids, start: int):
    """(B,) sums over the tokens from `start` on, by one pass over the whole text."""
    logs = model(ids).logits.log_softmax(-1)[:, start - 1 : -1]
    return logs.gather(2, ids[:, start:, None])[..., 0].sum(1)


@pytest.mark.parametrize("guided", [False, True])
def test_scores_of_beams_are_those_of_their_texts(family, guided):
    """A cache that followed the wrong beam would show; with guidance that of the negative prompt too."""
    model, (ids, _) = family.model(), inputs(101)
    options = {"guidance_scale": 1.6, "negative_prompt_ids": ids[:, 9:]} if guided else {}
    found = decoding.generate(
        model,
        ids,
        num_beams=5,
        num_return_sequences=5,
        max_new_tokens=12,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=1.0,
        **options,
    )
    expected = log_chances(model, found.sequences, LENGTH)
    if guided:
        away = log_chances(model, found.sequences[:, 9:], LENGTH - 9)
        expected = away + 1.6 * (expected - away)
    torch.testing.assert_close(found.sequences_scores * 12, expected, atol=2e-4, rtol=1e-5)
    summed = decoding.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    torch.testing.assert_close(summed.sum(1), found.sequences_scores * 12, atol=2e-4, rtol=1e-5)


def test_constraints_are_met_by_every_beam_that_has_the_room(family):
    model, (ids, mask) = family.model(), inputs(101, padded=True)
    one = [decoding.PhrasalConstraint([50, 50, 51]), decoding.DisjunctiveConstraint([[60, 61], [62]])]
    found = decoding.generate(
        model, ids, mask, constraints=one, num_beams=6, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0
    )
    for row in found[:, LENGTH:].tolist():
        text = " " + " ".join(map(str, row)) + " "
        assert " 50 50 51 " in text and (" 60 61 " in text or " 62 " in text)


@pytest.mark.parametrize(
    "options",
    [
        {"forced_eos_token_id": 3},
        {"prefix_allowed_tokens_fn": lambda text, ids: [50, 3]},
        {"eos_token_id": list(range(1, 100))},
    ],
    ids=["forced", "two tokens", "many stops"],
)
def test_constraints_where_little_else_may_follow(family, options):
    model, (ids, _) = family.model(), inputs(101)
    found = decoding.generate(
        model,
        ids,
        **{
            "force_words_ids": [[50]],
            "num_beams": 3,
            "max_new_tokens": 4,
            "eos_token_id": EOS,
            "pad_token_id": 0,
            **options,
        },
    )
    assert all(50 in row for row in found[:, LENGTH:].tolist())


def test_never_looks_to_the_last_length():
    """An ended beam of -1.0; a running one of -5.0 after 5 of 10 steps could still come to -0.5."""
    for early, can_improve in (("never", True), (False, False)):
        hypotheses = BeamHypotheses(1, decoding.GenerationConfig(early_stopping=early), 10)
        hypotheses.add(Hypothesis(-1.0, torch.tensor([3]), [0]))
        hypotheses.end_step(-5.0, 5)
        assert hypotheses.can_improve is can_improve


def test_every_bank_of_constraints_keeps_its_best():
    one = [decoding.PhrasalConstraint([1, 2]), decoding.PhrasalConstraint([3])]
    states = {
        "none": Progress((0, 1)),
        "begun": Progress((0, 1), 0, (1,)),
        "three": Progress((0,)),
        "all": Progress(()),
    }
    assert [states[key].bank(one) for key in states] == [0, 1, 2, 4]
    pool = [
        Beam(i, 0, total, states[key])
        for i, (key, total) in enumerate(
            [("none", -1.0), ("none", -2.0), ("all", -9.0), ("three", -5.0), ("three", -4.0), ("begun", -6.0)]
        )
    ]
    assert [beam.row for beam in allocate(pool, one, 6)] == [2, 4, 5, 0, 3, 1] and [
        beam.row for beam in allocate(pool, one, 3)
    ] == [2, 4, 5]
    after = states["begun"].after(1, one)  # a wrong token that begins the phrase anew
    assert (
        after == Progress((0, 1), 0, (1,))
        and after.after(2, one) == Progress((1,))
        and states["begun"].after(3, one) == Progress((0,))
    )


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"penalty_alpha": 0.5, "top_k": 3}, {"dola_layers": "high"}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
                                     {"num_beams": 4, "force_words_ids": [[50, 51]]}, {"guidance_scale": 1.5}], ids=str)  # fmt: skip
def test_rows_of_a_padded_batch_get_what_each_gets_alone(family, options):
    model, (ids, mask) = family.model(), inputs(101, padded=True)
    options = {"max_new_tokens": 10, "eos_token_id": EOS, "pad_token_id": 0, **options}
    batch = decoding.generate(model, ids, mask, **options)
    for i, start in ((0, PADDED), (1, 0)):
        alone = decoding.generate(model, ids[i : i + 1, start:], **options)[0, LENGTH - start :].tolist()
        found = batch[i, LENGTH:].tolist()
        assert found[: len(alone)] == alone and not any(found[len(alone) :])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"dola_layers": [0, 1]},
    ],
    ids=str,
)
def test_cached_equals_uncached(family, options):
    model, (ids, mask) = family.model(), inputs(101, padded=True)
    texts = [
        decoding.generate(
            model, ids, mask, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0, use_cache=use, **options
        ).tolist()
        for use in (True, False)
    ]
    assert texts[0] == texts[1]


# ---- Assisted


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}, {"min_new_tokens": 20}], ids=str
)
@pytest.mark.parametrize("helper", ["lookup", "lookup of one", "the same model", "another model"])
def test_assisted_greedy_gives_the_text_of_greedy(family, helper, options):
    model, (ids, _) = family.model(), inputs(101)
    prompt = torch.cat([ids[:1], ids[:1, :9]], 1)  # repeats itself
    given = {"lookup": {"prompt_lookup_num_tokens": 6}, "lookup of one": {"prompt_lookup_num_tokens": 1}, "the same model": {"assistant_model": model},
             "another model": {"assistant_model": family.model(seed=1), "assistant_confidence_threshold": 0.0, "num_assistant_tokens": 5}}[helper]  # fmt: skip
    options = {"max_new_tokens": 30, "eos_token_id": EOS, "pad_token_id": 0, **options}
    found = decoding.generate(model, prompt, **options, **given, return_dict_in_generate=True)
    assert found.sequences.tolist() == decoding.generate(model, prompt, **options).tolist()
    stats, new = found.stats, found.sequences.shape[1] - prompt.shape[1]
    assert stats["accepted"] + stats["passes"] >= new and stats["accepted"] <= stats["drafted"]
    if helper == "the same model":
        assert stats["accepted"] >= 0.6 * stats["drafted"] > 0 and stats["passes"] < new


def test_assisted_decoding_goes_over_the_switch_of_frequencies():
    """Past original_max_position_embeddings the whole text is turned otherwise: no pass may lead over that limit."""
    model = PHI3.model(**LONGROPE)
    ids, _ = inputs(101)
    limit = model.config.original_max_position_embeddings
    prompt = ids[:1, : limit - 5]
    options = {"max_new_tokens": 20, "eos_token_id": None}
    plain = model.generate(prompt, **options).tolist()
    for given in (
        {"prompt_lookup_num_tokens": 8},
        {"assistant_model": model},
        {"assistant_model": PHI3.model(seed=1, **LONGROPE), "assistant_confidence_threshold": 0.0},
    ):
        assert decoding.generate(model, prompt, **options, **given).tolist() == plain
    beams = {"num_beams": 3, "max_new_tokens": 12, "eos_token_id": None}
    assert (
        decoding.generate(model, prompt, **beams).tolist()
        == decoding.generate(model, prompt, **beams, use_cache=False).tolist()
    )


def test_strategies_see_pictures():
    folder = ROOT / "checkpoints" / "tiny-fuyu"
    model, processor = (
        weights.load(fuyu.FuyuForCausalLM, folder),
        fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenize.load(folder)),
    )
    inputs = processor("what is there?\n", picture(100, 130))
    del inputs["attention_mask"]
    options = {"max_new_tokens": 20, "eos_token_id": None}
    plain = decoding.generate(model, **inputs, **options).tolist()
    assert decoding.generate(model, **inputs, **options, prompt_lookup_num_tokens=5).tolist() == plain
    assert decoding.generate(model, **inputs, **options, assistant_model=model).tolist() == plain
    assert len(decoding.generate(model, **inputs, **options, num_beams=3)) == 1


def tiny_vocabulary(seed: int):
    return GPT_NEO.model(seed=seed, vocab_size=7, bos_token_id=0, eos_token_id=0, pad_token_id=0)


@pytest.mark.proof
@pytest.mark.parametrize("helper", ["lookup", "assistant"])
def test_assisted_sampling_keeps_the_distribution(helper, draws=10_000):
    """Chi-square over all texts of two tokens after a prompt, against their chances by whole passes."""
    model, assistant = tiny_vocabulary(0), tiny_vocabulary(1)
    prompt = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    given = (
        {"prompt_lookup_num_tokens": 3}
        if helper == "lookup"
        else {"assistant_model": assistant, "num_assistant_tokens": 3}
    )
    firsts = model(prompt).logits[0, -1].div(3).softmax(-1)
    chances = torch.stack(
        [
            firsts[i] * model(torch.cat([prompt, torch.tensor([[i]])], 1)).logits[0, -1].div(3).softmax(-1)
            for i in range(7)
        ]
    )
    counts, generator = torch.zeros(7, 7), torch.Generator().manual_seed(3)
    for _ in range(draws):
        found = decoding.generate(
            model,
            prompt,
            max_new_tokens=2,
            do_sample=True,
            temperature=3.0,
            top_k=0,
            eos_token_id=None,
            generator=generator,
            **given,
        )
        counts[found[0, -2], found[0, -1]] += 1
    expected = chances * draws
    large = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[large].sum() + (
        counts[~large].sum() - expected[~large].sum()
    ) ** 2 / expected[~large].sum().clamp(min=1)
    freedom = int(large.sum())
    assert statistic < freedom + 3.3 * (2 * freedom) ** 0.5, (
        f"chi-square {statistic:.1f} with {freedom} degrees of freedom"
    )


# ---- What is given and what comes back


def test_settings_come_from_the_folder_and_arguments_win(family):
    model, (ids, _) = family.model(), inputs(101)
    model.generation_config = {
        "do_sample": True,
        "temperature": 0.7,
        "max_new_tokens": 4,
        "transformers_version": "4.1",
        "_from_model_config": True,
    }
    torch.manual_seed(1)
    found = decoding.generate(model, ids)
    torch.manual_seed(1)
    assert (
        found.tolist()
        == decoding.generate(
            model, ids, generation_config={}, do_sample=True, temperature=0.7, max_new_tokens=4, top_k=50
        ).tolist()
    )
    model.generation_config["temperature"] = 0.0
    with pytest.raises(ValueError, match="temperature must be a number from 1e-30 to 1e.30, not 0.0"):
        decoding.generate(model, ids)
    greedy = model.generate(ids, max_new_tokens=6)
    assert (
        decoding.generate(model, ids, do_sample=False, temperature=None, max_new_tokens=6).tolist()
        == greedy.tolist()
    )
    config = decoding.GenerationConfig(max_new_tokens=6)
    assert decoding.generate(model, ids, generation_config=config).tolist() == greedy.tolist()
    assert (
        decoding.generate(model, ids, generation_config=config, max_new_tokens=2).tolist()
        == greedy[:, : LENGTH + 2].tolist()
    )


def test_lengths(family):
    model, (ids, _) = family.model(), inputs(101)
    for options, n in (
        ({}, 20),
        ({"max_length": LENGTH + 3}, 3),
        ({"max_length": LENGTH + 3, "max_new_tokens": 5}, 5),
        ({"max_new_tokens": 0}, 0),
    ):
        assert decoding.generate(model, ids, eos_token_id=None, **options).shape[1] == LENGTH + n
    long = torch.zeros(1, 60, dtype=torch.long)
    if hasattr(model, "max_positions"):  # 67
        assert decoding.generate(model, long, eos_token_id=None).shape[1] == 68, (
            "the default takes what room there is"
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"penalty_alpha": 0.5, "top_k": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_nothing_in_nothing_out_and_half_precision(family, options):
    ids, mask = inputs(101, padded=True)
    assert decoding.generate(family.model(), ids[:0], max_new_tokens=3, **options).shape == (0, LENGTH)
    for dtype in (torch.bfloat16, torch.float16):
        found = decoding.generate(
            kernels.prepare(family.model(dtype=dtype)),
            ids,
            mask,
            max_new_tokens=5,
            eos_token_id=None,
            **options,
        )
        assert found.shape == (2 * options.get("num_return_sequences", 1), LENGTH + 5)


def test_a_text_may_begin_with_nothing_or_with_embeddings(family):
    model, (ids, _) = family.model(bos_token_id=9), inputs(101)
    assert (
        decoding.generate(model, max_new_tokens=5).tolist()
        == decoding.generate(model, torch.tensor([[9]]), max_new_tokens=5).tolist()
    )
    table = next(part for part in model.modules() if isinstance(part, torch.nn.Embedding))
    for options in (
        {},
        {"min_length": LENGTH + 4, "eos_token_id": list(range(90))},
        {"num_beams": 3},
        {"repetition_penalty": 1.0, "penalty_alpha": 0.6, "top_k": 3},
    ):
        options = {"max_new_tokens": 6, "eos_token_id": None, **options}
        expected = decoding.generate(model, ids, **options)[:, LENGTH:]
        assert decoding.generate(model, inputs_embeds=table(ids), **options).tolist() == expected.tolist()


def test_what_is_recorded_has_the_documented_layout(family):
    model, (ids, _) = family.model(), inputs(101)
    wanted = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_attentions": True,
        "output_hidden_states": True,
    }
    for options, rows in (
        ({}, 2),
        ({"do_sample": True, "num_return_sequences": 3}, 6),
        ({"num_beams": 4}, 8),
        ({"penalty_alpha": 0.6, "top_k": 4}, 2),
        ({"dola_layers": "high"}, 2),
    ):
        found = decoding.generate(model, ids, max_new_tokens=5, eos_token_id=None, **options, **wanted)
        assert (
            [step.shape for step in found.scores]
            == [step.shape for step in found.logits]
            == [(rows, 101)] * 5
        )
        layers = len(found.attentions[0])
        assert len(found.attentions) == len(found.hidden_states) == 5 and all(
            len(step) == layers + 1 for step in found.hidden_states
        )
        assert {tuple(a.shape[i] for i in (0, 2, 3)) for a in found.attentions[0]} == {(rows, LENGTH, LENGTH)}
        assert found.attentions[-1][0].shape[0] == rows and found.attentions[-1][0].shape[2] == 1
        assert found.hidden_states[0][0].shape[:2] == (rows, LENGTH) and found.hidden_states[-1][0].shape[
            :2
        ] == (rows, 1)
        assert len(found.past_key_values) == LENGTH + 4


def test_assisted_decoding_records_what_plain_steps_do(family):
    model, (ids, _) = family.model(), inputs(101)
    wanted = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_attentions": True,
        "output_hidden_states": True,
    }
    plain = decoding.generate(model, ids[:1], max_new_tokens=12, eos_token_id=None, **wanted)
    found = decoding.generate(
        model,
        ids[:1],
        max_new_tokens=12,
        eos_token_id=None,
        assistant_model=model,
        assistant_confidence_threshold=0.0,
        num_assistant_tokens=4,
        **wanted,
    )
    assert (
        found.stats["accepted"] > 5
        and found.sequences.tolist() == plain.sequences.tolist()
        and len(found.past_key_values) == LENGTH + 11
    )
    for key in ("scores", "logits"):
        torch.testing.assert_close(getattr(found, key), getattr(plain, key), atol=2e-5, rtol=0)
    for key in ("attentions", "hidden_states"):
        for step, expected in zip(getattr(found, key), getattr(plain, key), strict=True):
            torch.testing.assert_close(step, expected, atol=2e-5, rtol=2e-5)


def test_a_processor_may_write_into_what_it_gets(family):
    def process(ids, scores):
        scores[:, 7] += 1e4
        return scores

    model, (ids, _) = family.model(), inputs(101)
    wanted = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "max_new_tokens": 3,
        "eos_token_id": None,
    }
    for options in ({}, {"num_beams": 2}):
        found = decoding.generate(model, ids, logits_processor=[process], **wanted, **options)
        assert (found.sequences[:, LENGTH:] == 7).all() and all(step.max() < 1e3 for step in found.logits)


def test_scores_of_a_text(family):
    model, (ids, mask) = family.model(), inputs(101, padded=True)
    expected = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    for rows in (1, 5, 1000):
        torch.testing.assert_close(decoding.score(model, ids, rows=rows), expected, atol=2e-5, rtol=0)
    padded = decoding.score(model, ids, mask)
    alone = decoding.score(model, ids[:1, PADDED:])
    torch.testing.assert_close(padded[:1, PADDED:], alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(padded[1], expected[1], atol=2e-5, rtol=0)
    assert not padded[0, :PADDED].any() and decoding.score(model, ids[:, :1]).shape == (2, 0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beams"]
)
def test_transition_scores_equal_transformers(family, options, normalize):
    ours, theirs = family.pair()
    ids, _ = inputs(101)
    given = {
        "max_new_tokens": 12,
        "eos_token_id": EOS,
        "pad_token_id": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
        **options,
    }
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **given)
    indices = getattr(expected, "beam_indices", None)
    expected_scores = theirs.compute_transition_scores(
        expected.sequences, expected.scores, indices, normalize_logits=normalize
    )
    found = decoding.compute_transition_scores(
        expected.sequences, expected.scores, indices, normalize_logits=normalize
    )
    torch.testing.assert_close(found, expected_scores, atol=1e-6, rtol=0)


# ---- Streams, stops, interrupts


@pytest.fixture(scope="module")
def story():
    folder = ROOT / "checkpoints" / "tiny-gpt-neo"
    tokenizer = tokenize.load(folder)
    return (
        weights.load(gpt_neo.GPTNeoForCausalLM, folder),
        tokenizer,
        torch.tensor([tokenizer.encode("Once upon a time")]),
    )


def test_a_stream_gives_the_same_piece_by_piece(story):
    model, tokenizer, ids = story
    whole = decoding.generate(model, ids, max_new_tokens=40)
    steps = list(decoding.stream(model, ids, max_new_tokens=40))
    assert (
        all(step.shape == (1,) for step in steps)
        and torch.cat(steps).tolist() == whole[0, ids.shape[1] :].tolist()
    )
    pieces = list(decoding.stream(model, ids, tokenizer=tokenizer, max_new_tokens=40))
    assert len(pieces) > 10 and "".join(pieces) == tokenizer.decode(
        whole[0], skip_special_tokens=True
    ).removeprefix("Once upon a time")
    assisted = list(decoding.stream(model, ids, max_new_tokens=40, prompt_lookup_num_tokens=4))
    assert torch.cat(assisted).tolist() == torch.cat(steps).tolist()
    for _ in decoding.stream(model, ids, max_new_tokens=2):
        assert torch.is_grad_enabled(), "between two steps all is as the caller has it"
    first = next(decoding.stream(model, ids, max_new_tokens=10**2))
    assert first.tolist() == steps[0].tolist(), "what is not asked for is not computed"


def test_streamers_of_transformers_work(story):
    transformers = pytest.importorskip("transformers")
    model, tokenizer, ids = story
    theirs = transformers.AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "tiny-gpt-neo")
    streamer = transformers.TextIteratorStreamer(theirs, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(
        target=decoding.generate, args=(model, ids), kwargs={"max_new_tokens": 30, "streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(
        decoding.generate(model, ids, max_new_tokens=30)[0, ids.shape[1] :], skip_special_tokens=True
    )
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(ids.shape[1] + 3)])
    processors = transformers.LogitsProcessorList([transformers.TopKLogitsWarper(1)])
    assert (
        decoding.generate(
            model, ids, max_new_tokens=30, stopping_criteria=criteria, logits_processor=processors
        ).shape[1]
        == ids.shape[1] + 3
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_stop_strings_end_a_text_also_inside_a_token(story, options):
    model, tokenizer, ids = story
    whole = decoding.generate(model, ids, max_new_tokens=40, **options)[0].tolist()
    text = tokenizer.decode(whole[ids.shape[1] :])
    for stop in (text[9:14], text[3:4], text[20:22], text[11:30]):
        found = decoding.generate(
            model, ids, max_new_tokens=40, stop_strings=["never there", stop], tokenizer=tokenizer, **options
        )[0].tolist()
        assert stop not in tokenizer.decode(found[ids.shape[1] : -1])
        if not options.get("num_beams"):  # of which others may be better
            assert stop in tokenizer.decode(found[ids.shape[1] :]) and found == whole[: len(found)]


def test_the_time_is_limited(story):
    model, _, ids = story
    assert (
        decoding.generate(model, ids, max_new_tokens=200, eos_token_id=None, max_time=0.0).shape[1]
        == ids.shape[1] + 1
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"penalty_alpha": 0.6, "top_k": 3}],
    ids=str,
)
def test_an_interrupt_brings_what_there_is_and_leaves_the_cache_whole(family, options):
    model, (ids, _) = family.model(), inputs(101)
    cache, passes = family.module.KVCache(), 0
    layers = [part for part in model.modules() if hasattr(type(part), "attend")]

    def interrupt(*_):
        nonlocal passes
        passes += 1
        if passes == 4:
            raise KeyboardInterrupt

    hook = layers[-1].register_forward_pre_hook(
        interrupt
    )  # the first layers have written what is new already
    options = {"max_new_tokens": 12, "eos_token_id": None, **options}
    with pytest.raises(KeyboardInterrupt) as caught:
        decoding.generate(model, ids[:1], past_key_values=cache, **options)
    hook.remove()
    plain = decoding.generate(model, ids[:1], **options)
    so_far = caught.value.ids
    assert so_far.shape[1] > LENGTH
    if len(options) == 2 or "prompt_lookup_num_tokens" in options:
        n = min(so_far.shape[1], LENGTH + 3)
        assert so_far[0, :n].tolist() == plain[0, :n].tolist() and len({k.shape[2] for k, _ in cache}) == 1
        kept = plain[:, : len(cache) + 1]
        again = decoding.generate(model, kept, past_key_values=cache, max_new_tokens=5, eos_token_id=None)
        assert again.tolist() == decoding.generate(model, kept, max_new_tokens=5, eos_token_id=None).tolist()


def test_a_streamer_that_raises_leaves_the_cache_whole(family):
    class Broken:
        def put(self, ids):
            if ids.dim() == 1:
                raise RuntimeError("no paper")

        def end(self):
            raise AssertionError

    for options in (
        {},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": family.model(seed=1), "assistant_confidence_threshold": 0.0},
    ):
        model, cache = family.model(), family.module.KVCache()
        ids = inputs(101)[0][:1]
        with pytest.raises(RuntimeError, match="no paper"):
            decoding.generate(
                model, ids, max_new_tokens=9, streamer=Broken(), past_key_values=cache, **options
            )
        text = decoding.generate(
            model,
            ids,
            max_new_tokens=20,
            eos_token_id=None,
            **{k: v for k, v in options.items() if "assist" not in k},
        )
        assert len(cache) >= LENGTH and len(cache[0][0]) == 1
        kept = text[:, : len(cache) + 1]
        assert (
            model.generate(kept, max_new_tokens=3, past_key_values=cache).tolist()
            == model.generate(kept, max_new_tokens=3).tolist()
        )


# ---- What cannot be

WRONG = [
    ({"num_beams": 3, "streamer": object()}, "a streamer needs num_beams=1"), ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences 3 is more than num_beams 2"),
    ({"num_return_sequences": 2}, "num_return_sequences 2 needs do_sample=True or num_beams"), ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups 3 does not divide num_beams 4"),
    ({"num_beams": 4, "num_beam_groups": 2, "do_sample": True}, "num_beam_groups has no do_sample"), ({"diversity_penalty": 1.0}, "needs num_beam_groups above 1"),
    ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping must be True, False or 'never'"), ({"num_beams": 2, "prompt_lookup_num_tokens": 2}, "assisted decoding is greedy or plain"),
    ({"prompt_lookup_num_tokens": 2}, "assisted decoding follows one text, not 2"), ({"penalty_alpha": 0.5, "num_beams": 2}, "has no beams"), ({"penalty_alpha": 0.5, "top_k": 1}, "needs top_k of 2"),
    ({"penalty_alpha": 0.5, "use_cache": False}, "needs use_cache"), ({"dola_layers": "middle"}, "dola_layers must be 'low', 'high' or layers from 0 to"), ({"dola_layers": [99]}, "dola_layers must be"),
    ({"stop_strings": "x"}, "stop_strings needs tokenizer="), ({"force_words_ids": [[3]]}, "need num_beams above 1"), ({"force_words_ids": [[]], "num_beams": 2}, "a constraint must be a list of token ids"),
    ({"force_words_ids": [[1, 2, 3], [4, 5]], "num_beams": 2}, "the constraints need 5 new tokens, and 3 may come"), ({"force_words_ids": [[[1], [1, 2]]], "num_beams": 2}, "none may begin another"),
    ({"constraints": [3], "num_beams": 2}, "constraints must be PhrasalConstraint or"), ({"negative_prompt_ids": IDS}, "negative_prompt_ids needs guidance_scale"),
    ({"negative_prompt_ids": IDS[:1], "guidance_scale": 2}, "negative_prompt_ids has 1 rows, input_ids 2"), ({"max_length": 5, "max_new_tokens": None}, "max_length 5 leaves no room after a prompt of 23 tokens"),
    ({"min_new_tokens": 9}, "ask for more than the 3 new"), ({"top_p": 0, "do_sample": True}, "top_p must be a number from 1e-30 to 1, not 0"), ({"num_beams": 0}, "num_beams must be a whole number from 1"),
    ({"num_beams": 2.5}, "num_beams must be a whole number"), ({"top_k": -1}, "top_k must be"), ({"temperature": float("inf")}, "temperature must be"), ({"max_new_tokens": "3"}, "max_new_tokens must be a whole number"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty must be"), ({"guidance_scale": -1}, "guidance_scale must be"), ({"inputs_embeds": torch.zeros(2, 3, 48)}, r"input_ids beside inputs_embeds must be of the same shape \(2, 3\), or of its last tokens, not \(2, 23\)"),
    ({"logits_processor": [lambda ids, scores: scores[:, :5]]}, r"a logits processor must give \(2, 101\) logits, not \(2, 5\)"), ({"logits_processor": [lambda ids, scores: None]}, "not NoneType"),
    ({"logits_processor": [lambda ids, scores: scores - torch.inf]}, "left no token to choose"), ({"logits_processor": [lambda ids, scores: scores * torch.nan]}, "left no token to choose"),
    ({"stopping_criteria": [lambda ids, scores: torch.zeros(5)]}, r"a stopping criterion must give True, False or \(2,\) booleans, not \(5,\)"),
    ({"prefix_allowed_tokens_fn": lambda text, ids: []}, "prefix_allowed_tokens_fn allows no token"), ({"eos_token_id": "x"}, "eos_token_id and pad_token_id must be token ids"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_cannot_be_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        decoding.generate(GPT_NEO.model(), inputs(101)[0], **{"max_new_tokens": 3, **options})
    assert "\n" not in str(caught.value)


def test_an_assistant_of_another_vocabulary_is_refused(family):
    with pytest.raises(
        ValueError, match="assistant_model has a vocabulary of 90 tokens, the model one of 101"
    ):
        decoding.generate(
            family.model(), inputs(101)[0][:1], assistant_model=family.model(vocab_size=90, pad_token_id=0)
        )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("stop", "stop_strings"),
        ("max_tokens", "max_new_tokens"),
        ("n", "num_return_sequences"),
        ("cfg_scale", "guidance_scale"),
        ("tokens", None),
        ("num_beam", "num_beams"),
        ("temprature", "temperature"),
        ("attention_masks", "attention_mask"),
        ("qqqqqqqq", None),
    ],
)
def test_unknown_names_are_told_with_the_nearest_known(family, name, near):
    hint = f": did you mean '{near}'\\?" if near else ""
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'{hint}$"):
        decoding.generate(family.model(), inputs(101)[0], **{name: 2})


def test_hints_mean_what_was_meant(family):
    model = family.model()
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        pytest.skip("this family has token types")
    with pytest.raises(TypeError, match="unexpected keyword argument 'token_type_ids'$"):
        decoding.generate(model, inputs(101)[0], token_type_ids=inputs(101)[0])


def test_there_is_nothing_to_stream_of_beams():
    with pytest.raises(ValueError, match="there is nothing to stream"):
        next(decoding.stream(GPT_NEO.model(), inputs(101)[0], num_beams=2))


# ---- Long prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 8, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 3},
    ],
    ids=str,
)
def test_a_prompt_in_chunks_gives_the_same_text(family, chunk, options):
    model = kernels.prepare(family.model())
    ids, mask = inputs(101, padded=True)
    given = (ids[1:], None) if "prompt_lookup_num_tokens" in options else (ids, mask)
    passes = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = {
        **options,
        "max_new_tokens": 6,
        "eos_token_id": None,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    whole = decoding.generate(model, *given, **options)
    passes.clear()
    parts = decoding.generate(model, *given, prefill_chunk_size=chunk, **options)
    assert torch.equal(whole.sequences, parts.sequences)
    for a, b in zip(whole.scores, parts.scores, strict=True):
        torch.testing.assert_close(a.clamp(min=-1e4), b.clamp(min=-1e4), atol=5e-5, rtol=0)
    assert max(passes) <= max(chunk, 7) or chunk == 100


def test_an_interrupt_between_chunks_leaves_the_cache_as_it_was(family):
    model, (ids, _) = family.model(), inputs(101)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    seen = []

    def stop(module, args, kwargs):
        seen.append(len(kwargs["past_key_values"]))
        if len(seen) == 3:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        decoding.generate(model, ids, past_key_values=cache, prefill_chunk_size=5, max_new_tokens=3)
    assert seen == [4, 9, 14] and len(cache) == 4


def test_chunks_are_of_ids_alone(family):
    model, (ids, _) = family.model(), inputs(101)
    vectors = model.get_submodule(family.table)(ids)
    for message, given in (
        ("use_cache", {"use_cache": False}),
        ("no attentions", {"output_attentions": True}),
        ("whole number from 1", {"prefill_chunk_size": 0}),
        ("not with inputs_embeds", {"input_ids": None, "inputs_embeds": vectors}),
    ):
        with pytest.raises(ValueError, match=message):
            decoding.generate(
                model, **{"input_ids": ids, "prefill_chunk_size": 3, "max_new_tokens": 2, **given}
            )


# ---- Rows that have ended ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}, {"guidance_scale": 1.7}, {"do_sample": True, "num_return_sequences": 3}, None],
                         ids=["greedy", "sampled", "guided", "three of each", "a config without a cache"])  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_have_ended_leave_the_batch(family, options, padded, monkeypatch):
    """The ids are as before, and the model reads fewer rows."""
    model, (ids, mask) = family.model(), inputs(101, padded=padded)
    ids, mask = ids.repeat(3, 1), mask.repeat(3, 1)
    ids[:, -1] = torch.arange(6) * 7
    if options is None:
        options = {}
        for part in model.modules():
            if hasattr(part, "config"):
                part.config.use_cache = False
    seen, forward = [], type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, *args, **more: seen.append(len(more["input_ids"])) or forward(self, *args, **more),
    )

    def run():
        del seen[:]
        torch.manual_seed(3)
        return decoding.generate(
            model,
            ids,
            mask,
            max_new_tokens=30,
            eos_token_id=list(range(0, 101, 4)),
            pad_token_id=1,
            **options,
        )

    found, rows = run(), list(seen)
    monkeypatch.setattr("decoders.decoding.state.Generation.may_drop_finished", False)
    assert torch.equal(found, run()) and len(set(seen[1:])) == 1
    assert rows[0] == seen[0] and rows[-1] < seen[-1] and len(rows) == len(seen), rows
