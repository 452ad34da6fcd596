"""What only Phi-3 has: longrope and its switch, a window, grouped heads, five checkpoints with five prompts."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from decoders import family, phi3, weights
from tests import folders
from tests.families import LONG, LONGROPE, PADDED, PHI3, SHORT, inputs, read
from tests.test_weights import equal

ORIGINAL = LONGROPE["original_max_position_embeddings"]
QUARTERS = {**LONGROPE, "partial_rotary_factor": 0.7, "head_dim": 12,
            "rope_scaling": {"type": "longrope", "short_factor": SHORT[:4], "long_factor": LONG[:4]}}  # fmt: skip
NO_WINDOW = {"sliding_window": None}


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {"num_key_value_heads": None}, {"num_key_value_heads": 1}, {"sliding_window": 1}, {"sliding_window": 3}, {"sliding_window": 22},
    {"sliding_window": 23}, {"sliding_window": 262144}, NO_WINDOW, {"partial_rotary_factor": 0.75, "head_dim": 16},
    {"tie_word_embeddings": True}, {"hidden_act": "gelu"}, {"pad_token_id": None}, {"rope_theta": 250000},
    {**LONGROPE, **NO_WINDOW}, LONGROPE, {**LONGROPE, "original_max_position_embeddings": 23}, {**QUARTERS, **NO_WINDOW},
    {**LONGROPE, "max_position_embeddings": 12},
], ids=str)  # fmt: skip
def test_every_variant_agrees(changes):
    ours, theirs = PHI3.pair(**changes)
    ids, mask = inputs(101, padded=True)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for options in ({}, {"attention_mask": mask}, {"attention_mask": mask, "position_ids": places}):
        real = options.get("attention_mask", torch.ones_like(ids)).bool()
        for whole in (False, True):
            a = ours(ids, output_attentions=whole, **options).logits
            assert (a - theirs(ids, **options).logits)[real].abs().max() < 2e-5


def test_windows_and_factors_are_noticed_at_all():
    ids, _ = inputs(101)
    results = [PHI3.model(**changes)(ids).logits for changes in (
        {"sliding_window": 22}, {"sliding_window": 23}, {**LONGROPE, "sliding_window": 23},
        {**LONGROPE, "sliding_window": 23, "original_max_position_embeddings": 22},
        {**LONGROPE, "sliding_window": 23, "original_max_position_embeddings": 23})]  # fmt: skip
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (a - b).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3, 11, 12, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_reads_its_window_only(window, dtype, monkeypatch):
    model = PHI3.model(sliding_window=window, dtype=dtype)
    ids, _ = inputs(101)
    cache = model(ids[:, :20]).past_key_values
    seen = []

    def watched(q, k, *rest):
        seen.append(k.shape[2])
        return phi3.grouped_query_attention(q, k, *rest)

    monkeypatch.setattr(phi3.Phi3Attention, "attend", staticmethod(watched))
    step = model(ids[:, 20:21], past_key_values=cache).logits
    assert seen == [window] * 3
    torch.testing.assert_close(
        step[:, 0], model(ids[:, :21]).logits[:, -1], atol=2e-5 if dtype == torch.float32 else 0.1, rtol=0
    )


def test_the_attention_factor_of_128k():
    config = PHI3.config(
        **{**LONGROPE, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    )
    assert abs(config.attention_factor - 1.1902380714) < 1e-9
    assert PHI3.config(**{**LONGROPE, "max_position_embeddings": 12}).attention_factor == 1.0
    assert PHI3.config().attention_factor == 1.0
    for extra, expected in (
        ({"factor": 2}, math.sqrt(1 + math.log(2) / math.log(12))),
        ({"attention_factor": 1.5}, 1.5),
    ):
        changes = {**LONGROPE, "rope_scaling": {**LONGROPE["rope_scaling"], **extra}}
        assert PHI3.config(**changes).attention_factor == expected
        ours, theirs = PHI3.pair(**changes)
        ids, _ = inputs(101)
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_old_names_of_longrope(name, tmp_path):
    """Transformers 5 crashes on "su", under which the first 128k checkpoint came."""
    old = {**LONGROPE, "rope_scaling": {**LONGROPE["rope_scaling"], "type": name}}
    ids, _ = inputs(101)
    assert torch.equal(PHI3.model(**old)(ids).logits, PHI3.model(**LONGROPE)(ids).logits)
    weights.save(PHI3.model(**old), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"]["type"] == "longrope"


# ---- The switch


def one_by_one(model, ids, mask, n):
    """Greedy text from whole passes only."""
    for _ in range(n):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        token = (
            model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits[:, -1:].argmax(-1)
        )
        ids, mask = torch.cat([ids, token], 1), F.pad(mask, (0, 1), value=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("per_row", [False, True], ids=["per batch", "per row"])
@pytest.mark.parametrize("kind", ["full", "one row padded", "all rows padded"])
def test_text_that_grows_past_the_limit_equals_whole_passes(per_row, kind):
    """With all rows padded 4.50 and 5 recompute too early, with the short factors, and not at the switch."""
    for seed in range(20):
        grows_as_whole_passes(per_row, kind, seed)


def grows_as_whole_passes(per_row, kind, seed):
    model = PHI3.model(seed=seed, rope_per_row=per_row, **LONGROPE)
    ids, mask = inputs(101, seed=seed)
    ids, mask = ids[:, :9], mask[:, :9].clone()
    mask[0, : {"full": 0, "one row padded": 3, "all rows padded": 5}[kind]] = 0
    mask[1, : {"full": 0, "one row padded": 0, "all rows padded": 2}[kind]] = 0
    expected = one_by_one(model, ids, mask, 15)
    assert model.generate(ids, mask, max_new_tokens=15, eos_token_id=None).tolist() == expected.tolist()
    assert (
        model.generate(ids, mask, max_new_tokens=15, eos_token_id=None, use_cache=False).tolist()
        == expected.tolist()
    )


def test_the_cache_is_computed_anew_once():
    model = PHI3.model(**LONGROPE)
    lengths = []
    model.model.register_forward_hook(lambda m, inputs, output: lengths.append(inputs[0].shape[1]))
    model.generate(inputs(101)[0][:, :9], max_new_tokens=10, eos_token_id=None)
    assert lengths == [9, 1, 1, 1, 13, 1, 1, 1, 1, 1]


def test_without_longrope_nothing_is_computed_anew():
    model = PHI3.model(original_max_position_embeddings=12)
    lengths = []
    model.model.register_forward_hook(lambda m, inputs, output: lengths.append(inputs[0].shape[1]))
    model.generate(inputs(101)[0][:, :9], max_new_tokens=6, eos_token_id=None)
    assert lengths == [9, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("window", [None, 5])
def test_transformers_5_crosses_the_limit_alike(window):
    ours, theirs = PHI3.pair(**{**LONGROPE, "sliding_window": window})
    ids, mask = inputs(101)
    a = ours.generate(ids[:, :9], max_new_tokens=20, eos_token_id=None)
    b = theirs.generate(
        ids[:, :9], attention_mask=mask[:, :9], max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert a.tolist() == b.tolist()


@torch.no_grad()
def test_the_longest_row_decides_unless_each_does():
    ids, mask = inputs(101)
    mask[0, :LENGTH_SHORT] = 0  # 11 tokens: short by itself
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for per_row in (False, True):
        model = PHI3.model(rope_per_row=per_row, **LONGROPE)
        batch = model(ids, attention_mask=mask, position_ids=places).logits[0, LENGTH_SHORT:]
        alone = model(ids[:1, LENGTH_SHORT:]).logits[0]
        assert ((batch - alone).abs().max() < 2e-5) == per_row
        both = model.generate(ids, mask, max_new_tokens=9, eos_token_id=None)[0, LENGTH_SHORT:]
        one = model.generate(ids[:1, LENGTH_SHORT:], max_new_tokens=9, eos_token_id=None)[0]
        if per_row:
            assert both.tolist() == one.tolist()


LENGTH_SHORT = 12


@torch.no_grad()
@pytest.mark.parametrize("past", ["cache", "tuple"])
def test_a_cache_of_the_other_factors_is_an_error(past):
    model = PHI3.model(**LONGROPE)
    ids, _ = inputs(101)
    cache = model(ids[:, :9]).past_key_values
    model(ids[:, 9:12], past_key_values=cache)
    given = cache if past == "cache" else tuple(cache)
    with pytest.raises(
        ValueError, match="other frequencies than past_key_values has: pass the whole text without it"
    ):
        model(ids[:, 12:13], past_key_values=given)
    whole = model(ids[:, :13]).past_key_values
    model(ids[:, 13:14], past_key_values=whole)


@torch.no_grad()
def test_a_cache_cut_back_to_a_short_text_keeps_its_factors():
    """Its keys have the long ones, whatever its length suggests now."""
    model = PHI3.model(**LONGROPE)
    ids, _ = inputs(101)
    cache = model(ids[:, :20]).past_key_values
    cache.truncate(5)
    with pytest.raises(ValueError, match="other frequencies"):
        model(ids[:, 5:8], past_key_values=cache)
    text = model.generate(ids[:, :9], max_new_tokens=2, eos_token_id=None, past_key_values=cache)
    assert text.tolist() == model.generate(ids[:, :9], max_new_tokens=2, eos_token_id=None).tolist()


@torch.no_grad()
def test_reordered_rows_take_their_factors_along():
    model = PHI3.model(rope_per_row=True, **LONGROPE)
    ids, mask = inputs(101)
    mask[0, :LENGTH_SHORT] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = model(ids, attention_mask=mask, position_ids=places).past_key_values
    assert cache.rope.tolist() == [False, True]
    cache.reorder(torch.tensor([1, 0]))
    assert cache.rope.tolist() == [True, False]
    step = {
        "attention_mask": F.pad(mask, (0, 1), value=1).flip(0),
        "position_ids": (places[:, -1:] + 1).flip(0),
    }
    logits = model(ids[:, :1].flip(0), past_key_values=cache, **step).logits
    alone = model(torch.cat([ids[1:], ids[1:, :1]], 1)).logits[0, -1]
    torch.testing.assert_close(logits[0, -1], alone, atol=2e-5, rtol=0)


# ---- Training


def test_embd_pdrop_does_nothing_as_in_every_version():
    model = PHI3.model(embd_pdrop=0.5).train()
    ids, _ = inputs(101)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_padding_token_never_trains():
    ours, theirs = PHI3.pair(pad_token_id=7)
    ids, _ = inputs(101)
    ids[0, :3] = 7
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
        assert model.model.embed_tokens.weight.grad[7].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_agree_beyond_the_limit(dtype):
    """In float32 by the formula: the fused kernel sums in another order, which alone is 1.06e-6."""
    ours, theirs = PHI3.pair(**LONGROPE)
    ids, _ = inputs(101)
    for model in (ours, theirs):
        model.to(dtype)(ids, labels=ids, output_attentions=dtype == torch.float32).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - expected[name].grad).abs().max() < 1e-6, name


# ---- Configs


@pytest.mark.parametrize(("change", "message"), [
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads 5 does not divide hidden_size 48"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    ({"partial_rotary_factor": 0.3}, "partial_rotary_factor 0.3 turns 3 dimensions of a head"),
    ({"rope_theta": "10000"}, "rope_theta must be a positive number"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "has none of the types longrope, su, yarn"),
    ({"rope_scaling": {"type": "longrope", "short_factor": SHORT}}, "long_factor must be a list of 6 numbers, not None"),
    ({"rope_scaling": {"type": "su", "short_factor": SHORT[1:], "long_factor": LONG}}, "short_factor must be a list of 6 numbers, not a list of 5"),
    ({"rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": [0.0] * 6}}, "must hold positive numbers, not 0.0"),
    ({"rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": LONG, "short_mscale": 1.2}}, "has short_mscale, which"),
    ({"rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": LONG, "factor": "2"}}, "factor must be a positive number"),
    ({"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
    ({"attention_bias": True}, "attention_bias True is not supported"),
    ({"pad_token_id": 101}, "pad_token_id 101 is outside vocab_size 101"),
    ({"model_type": "phi"}, "model_type 'phi' is not phi3"),
])  # fmt: skip
def test_configs_that_cannot_be_honoured_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PHI3.config(**change)


@pytest.mark.parametrize(("kind", "what"), [
    ("phi3small", "Phi-3-small .* block-sparse"), ("phi3_v", "Phi-3-vision .* picture encoder"),
    ("phimoe", "Phi-3.5-MoE .* sixteen experts"), ("phi4mm", "Phi-4-multimodal .* speech"),
])  # fmt: skip
def test_their_relatives_are_refused_by_what_they_are(kind, what):
    with pytest.raises(ValueError, match=f"'{kind}' is not served here: {what}"):
        family({"model_type": kind})


@pytest.mark.parametrize("changes", [{}, LONGROPE, QUARTERS], ids=["plain", "longrope", "quarters"])
def test_what_transformers_5_writes_is_read(changes, tmp_path):
    """It nests theta, factors and the original length in rope_parameters."""
    ours, theirs = PHI3.pair(**changes)
    theirs.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in stored and "rope_scaling" not in stored
    loaded = weights.load(phi3.Phi3ForCausalLM, tmp_path)
    assert loaded.config == ours.config
    ids, _ = inputs(101)
    assert torch.equal(loaded(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("changes", [{}, LONGROPE], ids=["plain", "longrope"])
def test_transformers_reads_what_we_write(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = PHI3.model(**changes)
    weights.save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids, _ = inputs(101)
    assert (theirs(ids).logits - model(ids).logits).abs().max() < 2e-5


@pytest.mark.parametrize(("name", "parameters", "rotary"), [
    ("Phi-3-mini-4k-instruct", 3_821_079_552, 96), ("Phi-3-mini-128k-instruct", 3_821_079_552, 96),
    ("Phi-3.5-mini-instruct", 3_821_079_552, 96), ("Phi-3-medium-4k-instruct", 13_960_238_080, 128),
    ("phi-4", 14_659_507_200, 128), ("phi-4.initial-sliding", 14_659_507_200, 128),
    ("Phi-4-mini-instruct", 3_836_021_760, 96), ("Phi-4-mini-reasoning", 3_836_021_760, 96),
])  # fmt: skip
def test_real_configs_have_the_published_size(data, name, parameters, rotary):
    config = read(phi3.Phi3Config, json.loads((data / "configs" / f"{name}.json").read_text()))
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.rotary_dim == rotary and config.eos_token_id is not None
    if "128k" in name or "3.5" in name or "mini-" in name and "4-mini" in name:
        assert config.rope_varies and config.original_max_position_embeddings == 4096
        assert abs(config.attention_factor - 1.1902380714) < 1e-9


def test_the_real_index_has_exactly_our_names(data):
    index = json.loads(
        (data / "configs" / "index" / "Phi-3.5-mini-instruct.model.safetensors.index.json").read_text()
    )
    config = read(phi3.Phi3Config, json.loads((data / "configs" / "Phi-3.5-mini-instruct.json").read_text()))
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(config)
    assert set(index["weight_map"]) == set(model.state_dict()) and len(index["weight_map"]) == 195
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in model.state_dict().values())


def test_shards_without_an_output_layer_load_when_tied(tmp_path):
    """As phi-4-mini's: bfloat16 in shards, no lm_head."""
    model = PHI3.model(tie_word_embeddings=True, dtype=torch.bfloat16)
    state = {name: p.detach() for name, p in model.named_parameters()}  # a tied one once
    assert "lm_head.weight" not in state
    folder = folders.write_config(tmp_path, PHI3, tie_word_embeddings=True)
    folders.safetensors_shards(folder, state)
    loaded = weights.load(phi3.Phi3ForCausalLM, folder)
    assert equal(loaded, model) and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_rope_per_row_is_an_override_of_loading(tmp_path):
    weights.save(PHI3.model(**LONGROPE), tmp_path)
    assert "rope_per_row" not in json.loads((tmp_path / "config.json").read_text())
    assert weights.load(phi3.Phi3ForCausalLM, tmp_path, rope_per_row=True).config.rope_per_row


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_back_and_forth_leaves_the_rotary_tables_alone(dtype):
    """Transformers 5 keeps 1/frequencies in a buffer, which `.to(bfloat16)` spoils for good."""
    model = PHI3.model(**LONGROPE)
    ids, _ = inputs(101)
    assert not list(model.to(dtype).buffers())
    places, long = torch.arange(500)[None], torch.tensor([True])
    exact = phi3.longrope_cos_sin(places, long, model.config, torch.zeros(1, dtype=torch.float64))
    half = phi3.longrope_cos_sin(places, long, model.config, torch.zeros(1, dtype=dtype))
    for b, c in zip(exact, half, strict=True):
        assert c.dtype == dtype and (c.double() - b).abs().max() < (6e-3 if dtype == torch.bfloat16 else 1e-3)


def test_padding_is_left_out_of_the_length():
    """Seven real tokens of twelve take the short factors, where the length of the row would take the long ones."""
    model = PHI3.model(**{**LONGROPE, "original_max_position_embeddings": 18})
    ids, mask = inputs(101, padded=True)
    mask[1, :PADDED] = 0
    ids = ids[:, : 18 + PADDED]
    text = model.generate(ids, mask[:, : 18 + PADDED], max_new_tokens=3, eos_token_id=None)
    for row in range(2):
        alone = model.generate(ids[row : row + 1, PADDED:], max_new_tokens=3, eos_token_id=None)
        assert text[row, PADDED:].tolist() == alone[0].tolist()
