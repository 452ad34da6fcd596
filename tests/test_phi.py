"""What only Phi has: partial rotary, rope scaling, four layouts of its checkpoints."""

import json

import pytest
import torch
import torch.nn.functional as F

from decoders import phi, tokenize, weights
from tests import folders
from tests.conftest import ROOT
from tests.families import PADDED, PHI, inputs, read
from tests.test_weights import equal

DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 11}


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {"num_key_value_heads": None}, {"num_key_value_heads": 1}, {"partial_rotary_factor": 0.34}, {"partial_rotary_factor": 1.0},
    {"qk_layernorm": True}, {"tie_word_embeddings": True}, {"hidden_act": "silu"}, {"pad_token_id": 3},
    {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"type": "linear", "factor": 3.0}},
    DYNAMIC, {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
], ids=str)  # fmt: skip
def test_every_variant_agrees(changes):
    ours, theirs = PHI.pair(**changes)
    ids, mask = inputs(101, padded=True)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for options in ({}, {"attention_mask": mask}, {"attention_mask": mask, "position_ids": places}):
        real = options.get("attention_mask", torch.ones_like(ids)).bool()
        for whole in (False, True):
            a = ours(ids, output_attentions=whole, **options).logits
            assert (a - theirs(ids, **options).logits)[real].abs().max() < 2e-5


@torch.no_grad()
def test_long_positions_agree():
    """At position 3,000 a rotary table in half precision would be off by radians."""
    ours, theirs = PHI.pair()
    ids, _ = inputs(101)
    places = torch.arange(3000, 3000 + ids.shape[1]).expand_as(ids)
    mask = torch.ones_like(ids)
    a, b = (m(ids, position_ids=places, attention_mask=mask).logits for m in (ours, theirs))
    assert (a - b).abs().max() < 5e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_back_and_forth_leaves_the_rotary_tables_alone(dtype):
    """Transformers keeps 1/frequencies in a buffer, which `.to(bfloat16)` spoils for good."""
    model = PHI.model()
    places = torch.arange(500)[None]
    arguments = (places, model.config)
    before = phi.rope_cos_sin(*arguments, torch.zeros(1))
    model.to(dtype).float()
    exact = phi.rope_cos_sin(*arguments, torch.zeros(1, dtype=torch.float64))
    half = phi.rope_cos_sin(*arguments, torch.zeros(1, dtype=dtype))
    for a, b, c in zip(before, exact, half, strict=True):
        assert (a - b).abs().max() < 1e-4 and (c.double() - b).abs().max() < (
            4e-3 if dtype == torch.bfloat16 else 1e-3
        )
    assert not list(model.buffers())


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
def test_scores_that_overflow_float16_stay_right(whole):
    """phi-2's do, in its last layers. Transformers 4.37 computed them in float32; eager 4.50 and 5 give NaN."""
    ours, theirs = PHI.pair(num_key_value_heads=4)
    for model in (ours, theirs):
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(120)
        model.half()
    truth = phi.PhiForCausalLM(ours.config).double().eval()
    truth.load_state_dict({name: t.double() for name, t in ours.state_dict().items()})
    ids, _ = inputs(101)
    assert theirs(ids).logits.isnan().any()
    found, exact = ours(ids, output_attentions=whole).logits.double(), truth(ids).logits
    # attention this sharp turns rounding into another choice of key here and there: most numbers must be right
    assert found.isfinite().all() and ((found - exact).abs() < 0.05).double().mean() > 0.9


# ---- Dynamic scaling


@torch.no_grad()
def test_dynamic_scaling_does_not_remember_earlier_calls():
    """Transformers keeps the base of a longer text for the shorter ones after it."""
    ids, _ = inputs(101)
    fresh = PHI.model(**DYNAMIC)(ids[:, :15]).logits
    model = PHI.model(**DYNAMIC)
    model(ids)
    assert torch.equal(model(ids[:, :15]).logits, fresh)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_dynamic_scaling_with_a_cache_equals_none(padded):
    """Past max_position_embeddings every token changes the base, also of keys that are in the cache."""
    model = PHI.model(**DYNAMIC)
    ids, mask = inputs(101, padded)
    options = {"max_new_tokens": 20, "eos_token_id": None}
    cached = model.generate(ids[:, :9], mask[:, :9], **options)
    assert cached.tolist() == model.generate(ids[:, :9], mask[:, :9], use_cache=False, **options).tolist()
    expected = ids[:, :9]
    for n in range(9, 29):
        places = (F.pad(mask[:, :9], (0, n - 9), value=1).cumsum(-1) - 1).clamp(min=0)
        padding = F.pad(mask[:, :9], (0, n - 9), value=1)
        logits = model(expected, attention_mask=padding, position_ids=places).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert cached.tolist() == expected.tolist()


@torch.no_grad()
def test_a_cache_of_another_base_is_an_error_not_nonsense():
    model = PHI.model(**DYNAMIC)
    ids, _ = inputs(101)
    past = model(ids[:, :9]).past_key_values
    model(ids[:, 9:11], past_key_values=past)
    with pytest.raises(ValueError, match="other frequencies than past_key_values has"):
        model(ids[:, 11:12], past_key_values=past)


@torch.no_grad()
def test_a_text_past_the_limit_leaves_no_cache():
    """None that could be cut back to a length at which its keys would look right."""
    model = PHI.model(**DYNAMIC)
    ids, _ = inputs(101)
    cache = phi.KVCache()
    assert model(ids[:, :20]).past_key_values is None
    assert model(ids[:, :20], past_key_values=cache).past_key_values is None and len(cache) == 0
    assert len(model(ids[:, :11], past_key_values=cache).past_key_values) == 11 == len(cache)


@torch.no_grad()
def test_dynamic_padded_rows_equal_single_ones_of_the_longest_length():
    model = PHI.model(**DYNAMIC)
    ids, mask = inputs(101, padded=True)
    batch = model.generate(ids[:1], mask[:1], max_new_tokens=9, eos_token_id=None)
    alone = model.generate(ids[:1, PADDED:], max_new_tokens=9, eos_token_id=None)
    assert batch[0, PADDED:].tolist() == alone[0].tolist()


# ---- Training


def test_gradient_checkpointing_changes_no_gradient():
    ids, _ = inputs(101)
    plain, saving = PHI.model().train(), PHI.model().train()
    saving.model.gradient_checkpointing = True
    for model in (plain, saving):
        model(ids, labels=ids).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5, msg=name)
    assert saving(ids).past_key_values is None


def test_the_padding_token_never_trains():
    ours, theirs = PHI.pair(pad_token_id=7)
    ids, _ = inputs(101)
    ids[0, :3] = 7
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
        assert model.model.embed_tokens.weight.grad[7].abs().max() == 0


def test_tying_keeps_the_bias(tmp_path):
    model = PHI.model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.bias.abs().max() > 0
    weights.save(model, tmp_path)
    assert equal(weights.load(phi.PhiForCausalLM, tmp_path), model)


# ---- Configs


@pytest.mark.parametrize(("change", "message"), [
    ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 48"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    ({"partial_rotary_factor": 0.3}, "partial_rotary_factor 0.3 turns 3 dimensions of a head"),
    ({"partial_rotary_factor": 0.01}, "turns 0 dimensions"),
    ({**DYNAMIC, "partial_rotary_factor": 0.17}, "dynamic rope_scaling needs more than 2 rotary dimensions"),
    ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "has none of the types linear, dynamic"),
    ({"rope_scaling": {"type": "linear", "factor": 1}}, "factor must be a number above 1, not 1"),
    ({"rope_scaling": {"type": "linear"}}, "factor must be a number above 1, not None"),
    ({"rope_scaling": "linear"}, "has none of the types linear, dynamic"),
    ({"pad_token_id": 101}, "pad_token_id 101 is outside vocab_size 101"),
    ({"hidden_act": "gelu_neu"}, "hidden_act 'gelu_neu'"),
    ({"model_type": "phi3"}, "model_type 'phi3' is not phi"),
])  # fmt: skip
def test_configs_that_cannot_be_honoured_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PHI.config(**change)


def test_nested_rope_parameters_of_transformers_5():
    tiny = {k: v for k, v in PHI.tiny.items() if k not in ("rope_theta", "partial_rotary_factor")}
    nested = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.34}
    config = read(phi.PhiConfig, {**tiny, "rope_parameters": nested})
    assert config.rope_theta == 500.0 and config.rotary_dim == 4
    assert config.rope_scaling == {"type": "linear", "factor": 2.0}
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PhiConfig(**{k: v for k, v in PHI.tiny.items() if k != "model_type"}).to_dict()
    assert read(phi.PhiConfig, theirs).rope_scaling is None


@pytest.mark.parametrize(("name", "parameters"), [
    ("phi-1", 1_418_270_720), ("phi-1_5", 1_418_270_720), ("phi-2", 2_779_683_840), ("phi-2.current", 2_779_683_840),
    ("phi-2.phi-msft", 2_779_683_840), ("phi-2.mixformer-sequential", 2_779_683_840), ("phi-2.resaved-fp32", 2_779_683_840),
])  # fmt: skip
def test_real_configs_have_the_published_size(data, name, parameters):
    config = read(phi.PhiConfig, json.loads((data / "configs" / f"{name}.json").read_text()))
    with torch.device("meta"):
        model = phi.PhiForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.rotary_dim == 32 and config.eos_token_id in (None, 50256)


@pytest.mark.parametrize("name", ["phi-2", "phi-2.resaved-fp32"])
def test_the_real_index_has_exactly_our_names(data, name):
    index = json.loads((data / "configs" / "index" / f"{name}.model.safetensors.index.json").read_text())
    with torch.device("meta"):
        model = phi.PhiForCausalLM(
            read(phi.PhiConfig, json.loads((data / "configs" / "phi-2.json").read_text()))
        )
    assert set(index["weight_map"]) == set(model.state_dict())
    total = sum(t.numel() for t in model.state_dict().values())
    assert index["metadata"]["total_size"] in (2 * total, 4 * total)


# ---- Older layouts

LEGACY = {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_inner": 80, "n_positions": 67, "rotary_dim": 6, "vocab_size": 101,
          "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.0}  # fmt: skip


def legacy(kind: str, kv_heads: int | None):
    """(config, tensors) of a 2023 checkpoint with the weights of PHI.model()."""
    model = PHI.model(num_key_value_heads=kv_heads or 4)
    state, stored = dict(model.state_dict()), {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            fused = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            stored[name.replace("self_attn.q_proj", "mixer.Wqkv")] = fused
        elif ".k_proj." not in name and ".v_proj." not in name:
            stored[name.replace("self_attn.dense", "mixer.out_proj").replace("input_layernorm", "ln")] = (
                tensor
            )
    renamed = {}
    for name, tensor in stored.items():
        name = name.replace("model.final_layernorm", "lm_head.ln").replace("model.embed_tokens", "embd.wte")
        name = name.replace("lm_head.weight", "lm_head.linear.weight").replace(
            "lm_head.bias", "lm_head.linear.bias"
        )
        if kind == "phi-msft":
            renamed[
                ("" if name.startswith("lm_head") else "transformer.") + name.replace("model.layers", "h")
            ] = tensor
        else:
            parts = name.replace("model.layers.", "layers.").split(".")
            if parts[0] == "layers":
                parts[1] = str(int(parts[1]) + 1)
            parts = ["layers", "4", *parts[1:]] if parts[0] == "lm_head" else parts
            parts = ["layers", "0", *parts[1:]] if parts[0] == "embd" else parts
            renamed[".".join(parts)] = tensor
    for name in list(renamed):
        if "fc1.weight" in name:  # what old files hold besides
            renamed[name.replace("fc1", "fc_in")] = renamed[name]
            renamed[name.replace("mlp.fc1.weight", "mixer.rotary_emb.inv_freq")] = torch.ones(3)
    return model, {**LEGACY, "model_type": kind, "n_head_kv": kv_heads}, renamed


@pytest.mark.parametrize("kind", ["phi-msft", "mixformer-sequential"])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_layouts_of_2023_load(tmp_path, kind, kv_heads):
    model, config, stored = legacy(kind, kv_heads)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(stored, tmp_path / "pytorch_model.bin")
    loaded = weights.load(phi.PhiForCausalLM, tmp_path)
    assert equal(loaded, model)
    ids, _ = inputs(101)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_joint_matrices_of_transformers_4_36_load(tmp_path):
    """query_key_value, interleaved by head. The converter of 4.37 still writes it, and 4.37 cannot read it."""
    model = PHI.model(num_key_value_heads=4)
    state, stored = dict(model.state_dict()), {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace("q_proj", f"{x}_proj")].view(4, 12, -1) for x in "qkv"]
            fused = torch.stack(parts, 1).reshape(144, *tensor.shape[1:])
            stored[name.replace("q_proj", "query_key_value")] = fused
        elif ".k_proj." not in name and ".v_proj." not in name:
            stored[name] = tensor
    folder = folders.write_config(tmp_path, PHI, num_key_value_heads=4)
    folders.safetensors_whole(folder, stored)
    assert equal(weights.load(phi.PhiForCausalLM, folder), model)


def test_a_joint_matrix_of_another_size_is_said(tmp_path):
    _, config, stored = legacy("phi-msft", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_head": 5}))
    name = "transformer.h.0.mixer.Wqkv.weight"
    torch.save({**stored, name: stored[name][:100]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="cut into q, k and v|num_attention_heads 5 does not divide"
    ) as caught:
        weights.load(phi.PhiForCausalLM, tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(config))  # only the matrix is wrong now
    with pytest.raises(ValueError, match=r"q_proj.weight is \(4, 48\) in pytorch_model.bin, not \(48, 48\)"):
        weights.load(phi.PhiForCausalLM, tmp_path)


def test_both_names_of_the_token_classifier(tmp_path):
    """4.37 wrote `classifier`; 4.50 and 5 look for `score`, and draw it anew without failing."""
    model = PHI.model("ForTokenClassification")
    state = {name.replace("score.", "classifier."): t for name, t in model.state_dict().items()}
    folder = folders.write_config(tmp_path, PHI)
    folders.safetensors_whole(folder, state)
    assert equal(weights.load(PHI.cls("ForTokenClassification"), folder), model)


# ---- Prompts


def test_instruct_and_output(data):
    tokenizer = tokenize.load(data / "hub" / "phi-2")
    ids = tokenizer.chat([{"role": "user", "content": "Why is the sky blue?"}])
    assert tokenizer.decode(ids) == "Instruct: Why is the sky blue?\nOutput:"
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert tokenizer.decode(tokenizer.chat(turns)) == "Instruct: a\nOutput: b\nInstruct: c\nOutput:"
    typed = tokenizer.chat([{"role": "user", "content": "x<|endoftext|>y  z"}])
    assert 50256 not in typed and "<|endoftext|>" in tokenizer.decode(typed)
    assert 50286 in typed, "two spaces are a token of their own, but no special one"
    for bad, message in (
        ([], "last message"),
        (turns[:2], "last message"),
        ([{"role": "system", "content": "x"}], "role 'system'"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.chat(bad)


def test_the_stop_that_no_config_names():
    """phi-1 and phi-1.5 name no stop id anywhere: the tokenizer's is taken."""
    from decoders.cli.loading import stop_ids

    tiny = ROOT / "checkpoints" / "tiny-phi"
    model, tokenizer = weights.load(phi.PhiForCausalLM, tiny), tokenize.load(tiny)
    assert stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    model.config.eos_token_id, model.generation_config = None, {}
    assert stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
