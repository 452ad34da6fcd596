"""Caches as arguments: every kind, ours and Transformers', reads and grows as in theirs."""

import copy
import pickle

import pytest
import torch

from decoders import hf, weights
from tests.families import FAMILIES, OPENAI_GPT, inputs

CLOSE = {"atol": 2e-5, "rtol": 0}
SLIDING = {"phi3": {"sliding_window": 7}}
transformers = pytest.importorskip("transformers")


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def pair(request, tmp_path):
    """Ours, and theirs of the same weights; Phi-3 with a window that the text exceeds."""
    family = request.param
    weights.save(family.model(**SLIDING.get(family.name, {})), tmp_path)
    ours = getattr(hf, family.class_name()).from_pretrained(tmp_path)
    theirs = getattr(transformers, family.class_name()).from_pretrained(tmp_path, dtype=torch.float32).eval()
    return ours, theirs


def caches(theirs):
    config = theirs.config.get_text_config()
    return {
        "DynamicCache": lambda: transformers.DynamicCache(),
        "DynamicCache of the config": lambda: transformers.DynamicCache(config=config),
        "StaticCache": lambda: transformers.StaticCache(config=config, max_cache_len=40),
    }


KINDS = ["DynamicCache", "DynamicCache of the config", "StaticCache"]


def skip_without_cache(ours):
    if type(ours).__name__.startswith("OpenAI"):
        pytest.skip("OpenAI GPT has no cache in Transformers")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_transformers_grows_in_place(pair, kind):
    """An empty one was taken for none and never filled; a filled one could not be unpacked."""
    ours, theirs = pair
    skip_without_cache(ours)
    (ids, _), cache = inputs(101), caches(theirs)[kind]()
    right = ours(ids).logits
    for start, end in ((0, 9), (9, 14), (14, 15), (15, 23)):
        output = ours(ids[:, start:end], past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache and cache.get_seq_length() == end
        torch.testing.assert_close(output.logits, right[:, start:end], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_ours_goes_on_from_a_cache_that_theirs_filled(pair, kind):
    ours, theirs = pair
    skip_without_cache(ours)
    if kind == "StaticCache" and type(ours).__name__.startswith("GPTNeo"):
        pytest.skip("GPT-Neo of Transformers counts its window from the end of the whole buffer")
    ids, _ = inputs(101)
    cache = caches(theirs)[kind]()
    theirs(ids[:, :12], past_key_values=cache, use_cache=True)
    step = ours(ids[:, 12:15], past_key_values=cache)
    torch.testing.assert_close(step.logits, ours(ids[:, :15]).logits[:, 12:], **CLOSE)
    if "Dynamic" in kind:  # and theirs from what ours has written
        found = theirs(ids[:, 15:], past_key_values=cache).logits
        torch.testing.assert_close(found, ours(ids).logits[:, 15:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "ours"])
def test_a_cache_given_to_generate_is_filled(pair, kind):
    ours, theirs = pair
    skip_without_cache(ours)
    ids, _ = inputs(101)
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    cache = hf.DynamicCache() if kind == "ours" else caches(theirs)[kind]()
    right = ours.generate(ids, **options)
    assert torch.equal(ours.generate(ids, past_key_values=cache, **options), right)
    assert cache.get_seq_length() == right.shape[1] - 1
    ours.generate(right, past_key_values=cache, **options)
    assert cache.get_seq_length() == right.shape[1] + 5


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_beams_and_samples_fill_a_dynamic_cache(pair, settings):
    ours, _ = pair
    skip_without_cache(ours)
    ids, _ = inputs(101)
    options = {"max_new_tokens": 5, "eos_token_id": None, **settings}
    for cache in (hf.DynamicCache(), transformers.DynamicCache()):
        torch.manual_seed(0)
        right = ours.generate(ids, **options)
        torch.manual_seed(0)
        assert torch.equal(ours.generate(ids, past_key_values=cache, **options), right)
        assert cache.get_seq_length() == 27


@torch.no_grad()
def test_caches_can_be_cropped_reordered_and_copied(family):
    model = getattr(hf, family.class_name())._from_config(config_of(family)).eval()
    ids, _ = inputs(101)
    right = model(ids).logits
    for cache in (hf.DynamicCache(), hf.StaticCache(config=model.config, max_cache_len=23)):
        model(ids, past_key_values=cache, use_cache=True)
        cache.crop(-3)
        assert cache.get_seq_length() == 20
        cache.crop(9)
        again = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
        for one in (cache, again):
            output = model(ids[:, 9:], past_key_values=one, use_cache=True)
            torch.testing.assert_close(output.logits, right[:, 9:], **CLOSE)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(again[1][0].flip(0), cache[1][0]) and len(again[:2]) == 2
        cache.crop(9)
        output = model(ids.flip(0)[:, 9:], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(output.logits, right.flip(0)[:, 9:], **CLOSE)
        cache.batch_repeat_interleave(2)
        assert len(cache[0][0]) == 4 and cache.get_seq_length() == 23
        cache.reset()
        assert cache.get_seq_length() == 0 and not len(cache)
    with pytest.raises(ValueError, match="24 positions do not fit into a StaticCache of 23"):
        full = hf.StaticCache(max_cache_len=23)
        model(ids, past_key_values=full, use_cache=True)
        model(ids[:, :1], past_key_values=full, use_cache=True)


@torch.no_grad()
def test_a_returned_cache_can_be_cropped(family):
    """And others that go on from where it was see nothing of it."""
    model, (ids, _) = getattr(hf, family.class_name())._from_config(config_of(family)).eval(), inputs(101)
    right = model(ids).logits
    past = model(ids[:, :12], use_cache=True).past_key_values
    longer = model(ids[:, 12:14], past_key_values=past, use_cache=True).past_key_values
    past.crop(9)
    assert past.get_seq_length() == 9 and longer.get_seq_length() == 14 and isinstance(past, tuple)
    output = model(ids[:, 9:], past_key_values=past)
    torch.testing.assert_close(output.logits, right[:, 9:], **CLOSE)
    output = model(ids[:, 14:], past_key_values=longer)
    torch.testing.assert_close(output.logits, right[:, 14:], **CLOSE)
    again = pickle.loads(pickle.dumps(past))
    assert all(torch.equal(a, b) for a, b in zip(again[1], past[1], strict=True)) and len(past[:2]) == 2


@torch.no_grad()
def test_both_names_of_the_cache(family):
    """Transformers 5.24 says `cache`, in and out; where both are given that one wins."""
    model, (ids, _) = getattr(hf, family.class_name())._from_config(config_of(family)).eval(), inputs(101)
    output = model(ids[:, :9], use_cache=True)
    assert output.cache is output.past_key_values is output["cache"] is output["past_key_values"]
    assert "cache" in output and output.get("cache") is output.cache
    right = model(ids[:, 9:], past_key_values=output.cache).logits
    assert torch.equal(model(ids[:, 9:], cache=output.cache).logits, right)
    assert torch.equal(model(ids[:, 9:], cache=output.cache, past_key_values=()).logits, right)
    options = {"max_new_tokens": 4, "eos_token_id": None}
    found = model.generate(ids, cache=output.cache, **options)
    assert torch.equal(found, model.generate(ids, **options))
    given = model.prepare_inputs_for_generation(ids, cache=output.cache)
    assert given["input_ids"].shape == (2, 14)
    without = hf.ModelOutput(logits=ids, cache=None)
    assert without.cache is None and "past_key_values" not in without
    assert list(hf.ModelOutput(cache=(1,))) == ["past_key_values"]


@torch.no_grad()
def test_embeds_go_on_from_a_cache(family):
    """As ids do: the whole prompt is given, and what the cache holds is left out. Zeros were read instead."""
    model, (ids, _) = getattr(hf, family.class_name())._from_config(config_of(family)).eval(), inputs(101)
    embeds = model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    right = model.generate(ids, **options)[:, 23:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), right)
    past = model(ids[:, :9], use_cache=True).past_key_values
    assert torch.equal(model.generate(inputs_embeds=embeds, past_key_values=past, **options), right)


def config_of(family):
    name = "OpenAIGPTConfig" if family is OPENAI_GPT else family.class_name("Config")
    return getattr(hf, name)(**{key: value for key, value in family.tiny.items() if key != "model_type"})
