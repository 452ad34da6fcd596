"""Settings that meet: padding, embeddings, caches, guidance, frequencies that follow from the length, odd ids.

What Transformers gets right is compared with it; else a property decides: cached as uncached, a padded row as the row
alone, or the definition by whole passes.
"""

import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from decoders import decoding, kernels
from decoders.decoding.settings import Arguments
from tests.families import GPT_NEO, LENGTH, LONGROPE, PADDED, PERSIMMON, PHI, PHI3, inputs

EOS = [3, 17, 40, 77]
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 26}
CHANGING = [(PHI3, LONGROPE), (PHI, DYNAMIC), (PERSIMMON, DYNAMIC)]  # frequencies that change with the length


def embedded(model, ids):
    return next(part for part in model.modules() if isinstance(part, torch.nn.Embedding))(ids)


def plain(model, ids, n: int, **options):
    return decoding.generate(model, ids, max_new_tokens=n, eos_token_id=None, **options)


# ---- Contrastive search ------------------------------------------------------------------------------------


def contrastive_by_definition(model, ids, n: int, alpha: float, k: int):
    """Whole passes over one sequence for each candidate."""
    for _ in range(n):
        probs, tokens = model(ids).logits[0, -1].float().softmax(-1).topk(k)
        gains = []
        for p, token in zip(probs, tokens, strict=True):
            longer = torch.cat([ids, token.view(1, 1)], 1)
            states = model(longer, output_hidden_states=True).hidden_states[-1][0].float()
            similarity = F.cosine_similarity(states[-1:], states[:-1]).amax()
            gains.append((1 - alpha) * p - alpha * similarity)
        ids = torch.cat([ids, tokens[torch.stack(gains).argmax()].view(1, 1)], 1)
    return ids


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(("changing", "changes"), [*CHANGING, (GPT_NEO, {}), (PHI3, {})], ids=str)
def test_contrastive_search_is_its_definition(changing, changes, chunk):
    """Also where the sequence grows past original_max_position_embeddings, and all of it is read anew."""
    model = changing.model(**changes)
    for length in (8, LENGTH):
        ids = inputs(101)[0][:1, :length]
        expected = contrastive_by_definition(model, ids, 9, 0.6, 4)
        found = plain(model, ids, 9, penalty_alpha=0.6, top_k=4, prefill_chunk_size=chunk)
        assert found.tolist() == expected.tolist()


def test_contrastive_search_goes_on_from_a_cache(family):
    model, (ids, _) = family.model(), inputs(101)
    cache = model(ids[:, :7], use_cache=True).past_key_values
    options = {"penalty_alpha": 0.7, "top_k": 5}
    found = plain(model, ids, 8, past_key_values=cache, **options)
    assert found.tolist() == plain(model, ids, 8, **options).tolist()
    assert len(cache) == LENGTH + 7


# ---- Padding -----------------------------------------------------------------------------------------------

SEEN = [
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 0.3},
    {"sequence_bias": [[[i, j], 30.0] for i in range(0, 101, 2) for j in (5, 50)], "repetition_penalty": 1.2},
    {"bad_words_ids": [[i, j] for i in range(101) for j in range(0, 101, 9)]},
    {"no_repeat_ngram_size": 1, "num_beams": 3},
    {"no_repeat_ngram_size": 1, "penalty_alpha": 0.4, "top_k": 4},
    {"repetition_penalty": 2.0, "do_sample": True, "top_k": 1, "num_return_sequences": 2},
]


@pytest.mark.parametrize("given", ["ids", "embeddings", "both"])
@pytest.mark.parametrize("options", SEEN, ids=lambda o: " ".join(o))
def test_padding_was_never_seen(family, options, given):
    model, (ids, mask) = family.model(), inputs(101, padded=True)
    ids[0, :PADDED] = torch.tensor([50, 5, 7, 9])  # some that the model would like to say
    embeds = embedded(model, ids)
    own = {"ids": [{"input_ids": ids}, {"input_ids": ids[:1, PADDED:]}],
           "embeddings": [{"inputs_embeds": embeds}, {"inputs_embeds": embeds[:1, PADDED:]}],
           "both": [{"input_ids": ids, "inputs_embeds": embeds}, {"input_ids": ids[:1, PADDED:], "inputs_embeds": embeds[:1, PADDED:]}]}[given]  # fmt: skip
    options = {"max_new_tokens": 8, "eos_token_id": None, **options}
    batch = decoding.generate(model, attention_mask=mask, **own[0], **options)
    alone = decoding.generate(model, **own[1], **options)
    assert batch[0, -8:].tolist() == alone[0, -8:].tolist()


def test_a_prompt_padded_on_the_right_is_warned_of(family):
    model, (ids, mask) = family.model(), inputs(101)
    mask[0, -3:] = 0
    with pytest.warns(UserWarning, match="padded on the right.*padding_side='left'"):
        plain(model, ids, 2, attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(model, ids, 2, attention_mask=inputs(101, padded=True)[1])


# ---- Embeddings and positions of the caller ----------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"repetition_penalty": 2.0}], ids=str)
def test_embeddings_beside_ids_give_what_ids_give(family, options, use_cache):
    model, (ids, mask) = family.model(), inputs(101, padded=True)
    options = {"attention_mask": mask, "use_cache": use_cache, **options}
    expected = plain(model, ids, 7, **options)
    found = plain(model, ids, 7, inputs_embeds=embedded(model, ids), **options)
    assert found.tolist() == expected.tolist()
    if "repetition_penalty" not in options:  # which sees the ids of a prompt
        alone = decoding.generate(
            model, inputs_embeds=embedded(model, ids), max_new_tokens=7, eos_token_id=None, **options
        )
        assert alone.tolist() == expected[:, LENGTH:].tolist()


def test_embeddings_beside_other_ids_are_what_is_read(family):
    """As in Transformers: the ids are shown, and count as seen."""
    if family.name == "openai-gpt":
        pytest.skip("Transformers 5.23 generates from no embeddings in this family")
    ours, theirs = family.pair()
    ids, _ = inputs(101)
    vectors = embedded(ours, ids.flip(1))
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.5}
    found = decoding.generate(ours, ids, inputs_embeds=vectors, **options)
    expected = theirs.generate(ids, inputs_embeds=vectors, attention_mask=torch.ones_like(ids), **options)
    assert found.tolist() == expected.tolist()


def test_embeddings_go_on_from_a_cache(family):
    model, (ids, _) = family.model(), inputs(101)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    vectors = embedded(model, ids)
    found = decoding.generate(
        model, inputs_embeds=vectors, past_key_values=cache, max_new_tokens=6, eos_token_id=None
    )
    assert found.tolist() == plain(model, ids, 6)[:, LENGTH:].tolist()


def test_embeddings_may_be_longer_than_the_limit_of_their_frequencies():
    model, (ids, _) = PHI3.model(**LONGROPE), inputs(101)
    for prompt in (ids[:, :8], ids):
        found = decoding.generate(
            model, inputs_embeds=embedded(model, prompt), max_new_tokens=9, eos_token_id=None
        )
        assert found.tolist() == plain(model, prompt, 9)[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_of_the_caller_go_on_by_ones(family, use_cache):
    ours, theirs = family.pair()
    ids, _ = inputs(101)
    positions = torch.arange(LENGTH)[None].expand(2, -1) * 2
    options = {"max_new_tokens": 6, "eos_token_id": None, "use_cache": use_cache}
    found = decoding.generate(ours, ids, position_ids=positions, **options)
    assert found.tolist() == decoding.generate(ours, ids, position_ids=positions[:1], **options).tolist()
    for _ in range(6):
        new = theirs(ids, position_ids=positions).logits[:, -1].argmax(-1, keepdim=True)
        ids, positions = torch.cat([ids, new], 1), torch.cat([positions, positions[:, -1:] + 1], 1)
    assert found.tolist() == ids.tolist()
    with pytest.raises(
        ValueError, match=r"position_ids must be a tensor \(2, 29\) of whole numbers, not \(2, 23\)"
    ):
        decoding.generate(ours, ids, position_ids=positions[:, :23], **options)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}, {"penalty_alpha": 0.5, "top_k": 3}], ids=str)  # fmt: skip
def test_positions_follow_every_strategy(family, options):
    model, (ids, mask) = family.model(), inputs(101, padded=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = plain(model, ids, 6, attention_mask=mask, position_ids=positions, **options)
    assert found.tolist() == plain(model, ids, 6, attention_mask=mask, **options).tolist()


def test_logits_to_keep_changes_nothing(family):
    model, (ids, _) = family.model(), inputs(101)
    assert plain(model, ids, 4, logits_to_keep=1).tolist() == plain(model, ids, 4).tolist()


# ---- Guidance ----------------------------------------------------------------------------------------------


def guided_by_definition(model, ids, negative, n: int, scale: float):
    for _ in range(n):
        own, away = (model(rows).logits[:, -1].log_softmax(-1) for rows in (ids, negative))
        new = (away + scale * (own - away)).argmax(-1, keepdim=True)
        ids, negative = torch.cat([ids, new], 1), torch.cat([negative, new], 1)
    return ids


@pytest.mark.parametrize("negative", [1, 4, 10, 18])
@pytest.mark.parametrize(("changing", "changes"), CHANGING, ids=str)
def test_guidance_gives_each_prompt_the_frequencies_of_its_own_length(changing, changes, negative):
    model, (ids, _) = changing.model(**changes), inputs(101)
    prompt = ids[:, :9] if changes is LONGROPE else ids
    away = ids[:, -negative:]
    found = plain(model, prompt, 8, guidance_scale=1.7, negative_prompt_ids=away)
    assert found.tolist() == guided_by_definition(model, prompt, away, 8, 1.7).tolist()


def test_guidance_across_the_limit_equals_transformers():
    ours, theirs = PHI3.pair(**LONGROPE)
    ids, options = inputs(101)[0][:, :9], {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    options |= {"guidance_scale": 1.7, "return_dict_in_generate": True, "output_scores": True}
    found = decoding.generate(ours, ids, negative_prompt_ids=ids[:, -2:], **options)
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), negative_prompt_ids=ids[:, -2:], **options
    )
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}], ids=str)  # fmt: skip
@pytest.mark.parametrize("negative", [None, 5])
def test_guidance_of_embeddings_is_that_of_their_ids(family, negative, options):
    model, (ids, mask) = family.model(), inputs(101, padded=True)
    options = {"guidance_scale": 1.6, "attention_mask": mask, **options}
    if negative:
        options["negative_prompt_ids"] = ids[:, 3 : 3 + negative]
    expected = plain(model, ids, 7, **options)[:, LENGTH:]
    found = decoding.generate(
        model, inputs_embeds=embedded(model, ids), max_new_tokens=7, eos_token_id=None, **options
    )
    assert found.tolist() == expected.tolist()


def test_guidance_with_a_cache_and_what_is_recorded(family):
    model, (ids, _) = family.model(), inputs(101)
    options = {
        "guidance_scale": 1.6,
        "negative_prompt_ids": ids[:, :5].repeat(1, 6),
    }  # longer than the prompts
    expected = plain(model, ids, 6, **options)
    cache = model(ids[:, :7], use_cache=True).past_key_values
    assert plain(model, ids, 6, past_key_values=cache, **options).tolist() == expected.tolist()
    recorded = plain(model, ids, 6, output_attentions=True, return_dict_in_generate=True, **options)
    assert recorded.sequences.tolist() == expected.tolist()
    assert recorded.attentions[0][0].shape[0] == 2 and recorded.attentions[0][0].shape[2:] == (LENGTH, LENGTH)


# ---- Sequences of different lengths in one call ------------------------------------------------------------


@pytest.mark.parametrize(("changing", "changes"), CHANGING, ids=str)
def test_a_finished_sequence_still_decides_on_the_frequencies(changing, changes):
    """The longest of a batch does, finished or not: cached and watched steps agree."""
    model, (ids, mask) = changing.model(**changes), inputs(101)
    ids, mask = ids[:, :11], mask[:, :11].clone()
    mask[1, :6] = 0  # the first is over the limit soon, and ends in its first step
    first = int(plain(model, ids, 1, attention_mask=mask)[0, -1])
    options = {"attention_mask": mask, "eos_token_id": [first], "pad_token_id": 1, "max_new_tokens": 12}
    expected = decoding.generate(model, ids, use_cache=False, **options)
    assert decoding.generate(model, ids, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("changing", "changes"), CHANGING, ids=str)
def test_beams_of_unequal_prompts_cached_and_uncached(changing, changes, options):
    model, (ids, mask) = changing.model(**changes), inputs(101, padded=True)
    ids, mask = (ids[:, :10], mask[:, :10]) if changes is LONGROPE else (ids, mask)
    options = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": EOS, "pad_token_id": 1, **options}
    cached = decoding.generate(model, ids, **options)
    assert cached.tolist() == decoding.generate(model, ids, use_cache=False, **options).tolist()


# ---- Beam sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"min_p": 1.0}, {"typical_p": 1e-6}, {"epsilon_cutoff": 0.9}, {"eta_cutoff": 0.9}], ids=str)  # fmt: skip
def test_sampled_beams_without_stop_ids_keep_two_tokens(family, filters):
    """As Transformers: one would leave a beam nothing else to say."""
    ours, theirs = family.pair()
    ids, _ = inputs(101)
    for beams in (2, 3):
        options = {"num_beams": beams, "do_sample": True, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 1, **filters}  # fmt: skip
        torch.manual_seed(beams)
        found = decoding.generate(ours, ids, **options)
        torch.manual_seed(beams)
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert found.tolist() == expected.tolist()


# ---- Odd ids -----------------------------------------------------------------------------------------------

SCORES = [
    {"suppress_tokens": [{}]}, {"begin_suppress_tokens": [{}]}, {"bad_words_ids": [[{}]]}, {"bad_words_ids": [[5, {}]]}, {"bad_words_ids": [[{}, 5]]},
    {"sequence_bias": [[[{}], 1.0]]}, {"sequence_bias": [[[5, {}], 1.0]]}, {"force_words_ids": [[{}]], "num_beams": 2}, {"force_words_ids": [[[3], [4, {}]]], "num_beams": 2},
    {"forced_eos_token_id": "{}"}, {"forced_eos_token_id": [3, "{}"]}, {"forced_bos_token_id": "{}"}, {"eos_token_id": "{}", "min_new_tokens": 2}, {"eos_token_id": [3, "{}"]},
    {"pad_token_id": "{}"}, {"generation_config": {"eos_token_id": "{}"}}, {"negative_prompt_ids": "{}", "guidance_scale": 2.0}, {"prefix_allowed_tokens_fn": "{}"},
]  # fmt: skip


def with_id(value, id):
    """`value` with `id` where a dict or a brace stands."""
    if value in ({}, "{}"):
        return id
    if isinstance(value, list):
        return [with_id(part, id) for part in value]
    return {key: with_id(part, id) for key, part in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("id", [-1, -101, 101, 10**9])
@pytest.mark.parametrize("where", SCORES, ids=str)
def test_ids_outside_the_vocabulary_are_one_sentence(where, id):
    model, (ids, _) = GPT_NEO.model(), inputs(101)
    options = {name: with_id(value, id) for name, value in where.items()}
    if "negative_prompt_ids" in options:
        options["negative_prompt_ids"] = torch.tensor([[5, id], [6, 7]])
    if "prefix_allowed_tokens_fn" in options:
        options["prefix_allowed_tokens_fn"] = lambda text, ids: [5, id]
    name = (
        "a constraint"
        if "force_words_ids" in where
        else next(iter(options.get("generation_config", options)))
    )
    with pytest.raises(ValueError, match=f"{name} must .*{id}") as caught:
        decoding.generate(model, ids, **{"max_new_tokens": 4, **options})
    assert "\n" not in str(caught.value)


def test_ids_of_a_checkpoint_outside_its_vocabulary_are_no_stop_ids():
    """Files of small models often keep the ids of large ones."""
    model, (ids, _) = GPT_NEO.model(eos_token_id=50256), inputs(101)
    model.generation_config = {"eos_token_id": [50256, 3], "pad_token_id": -1}
    found = decoding.generate(model, ids, max_new_tokens=30)
    expected = decoding.generate(model, ids, max_new_tokens=30, eos_token_id=3, pad_token_id=3)
    assert found.tolist() == expected.tolist()


# ---- Greedy by other words, NaN, and what is said of odd arguments -----------------------------------------


@pytest.mark.parametrize(
    "zero", [{"temperature": 0.0}, {"top_p": 0}, {"temperature": 0, "top_p": 0.0, "typical_p": 0}]
)
def test_zeros_for_sampling_are_greedy_where_nothing_is_sampled(family, zero):
    model, (ids, _) = family.model(), inputs(101)
    greedy = plain(model, ids, 6).tolist()
    assert plain(model, ids, 6, do_sample=False, **zero).tolist() == greedy
    model.generation_config = zero
    assert plain(model, ids, 6).tolist() == greedy


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 3, "do_sample": True}, {"penalty_alpha": 0.5, "top_k": 3},
     {"dola_layers": "high"}, {"guidance_scale": 2.0}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)  # fmt: skip
def test_weights_that_are_nan_end_in_one_sentence(family, options):
    model, (ids, _) = kernels.prepare(family.model()), inputs(101)
    with torch.no_grad():
        next(part for part in model.modules() if hasattr(part, "lm_head")).lm_head.weight[7] = math.nan
    with pytest.raises(ValueError, match="the model's logits hold NaN") as caught:
        decoding.generate(model, ids[:1], max_new_tokens=4, eos_token_id=None, **options)
    assert "\n" not in str(caught.value)
    if not options:
        found = plain(model, ids, 4, remove_invalid_values=True)
        assert found.shape == (2, LENGTH + 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([[1, 2, 3]], {}, r"input_ids must be .*not list: torch.tensor\(\[ids\]\) is one"),
        (["Once"], {}, r"input_ids must be .*not str: torch.tensor\(\[tokenizer.encode\(text\)\]\) is one"),
        ([torch.tensor([1, 2])], {}, r"input_ids must be .*not \(2,\): ids\[None\] is one"),
        ([torch.ones(1, 3).long(), 50], {}, "attention_mask must be .*, not int: .* is max_new_tokens=50"),
        ([torch.ones(1, 3).long()], {"assistant_model": "gpt2"}, "assistant_model must be a model of this package.*not str"),
        ([torch.ones(1, 3).long()], {"streamer": print}, "streamer must have put.ids. and end"),
        ([torch.ones(1, 3).long()], {"generation_config": 50}, "generation_config must be a GenerationConfig or a dict, not 50"),
        ([torch.ones(1, 3).long()], {"negative_prompt_ids": [1], "guidance_scale": 2}, "negative_prompt_ids must be a tensor .*not list"),
        ([torch.ones(1, 3).long()], {"sequence_bias": 3}, "sequence_bias must be"),
    ],
    ids=str,
)  # fmt: skip
def test_odd_arguments_are_one_sentence(arguments, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        decoding.generate(GPT_NEO.model(), *arguments, **options)
    assert "\n" not in str(caught.value)


ODD = [-1, 1.5, "x", [], {}, [[]], math.nan, object(), torch.tensor(3), [1, "a"], {1: 2}, (3,), (3, "x"), [[-1, 2], 1.0], torch.ones(2, 23)]  # fmt: skip
TAKEN = [field.name for kind in (decoding.GenerationConfig, Arguments) for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("name", [*TAKEN, "generation_config", "attention_mask", "position_ids"])
def test_odd_values_are_honoured_or_refused_in_one_sentence(name):
    model, (ids, _) = GPT_NEO.model(), inputs(101)
    for value in ODD:
        try:
            decoding.generate(model, ids, **{"max_new_tokens": 2, name: value})
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 300, (value, error)
