"""What only Persimmon has: its norms on q and k, its rotary base, 262,144 tokens, Adept's own release."""

import argparse
import enum
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from decoders import persimmon, tokenize, weights
from tests import folders
from tests.families import PADDED, PERSIMMON, inputs, read
from tests.test_weights import equal

DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 11}


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {"qk_layernorm": False}, {"partial_rotary_factor": 0.34}, {"partial_rotary_factor": 1.0}, {"hidden_act": "gelu"},
    {"tie_word_embeddings": True}, {"pad_token_id": 3}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "linear", "factor": 3.0}}, DYNAMIC, {"layer_norm_eps": 0.1}, {"max_position_embeddings": 5},
], ids=str)  # fmt: skip
def test_every_variant_agrees(changes):
    ours, theirs = PERSIMMON.pair(**changes)
    ids, mask = inputs(101, padded=True)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for options in ({}, {"attention_mask": mask}, {"attention_mask": mask, "position_ids": places}):
        real = options.get("attention_mask", torch.ones_like(ids)).bool()
        for whole in (False, True):
            a = ours(ids, output_attentions=whole, **options).logits
            assert (a - theirs(ids, **options).logits)[real].abs().max() < 2e-5


def test_the_base_is_25000_whatever_the_config_leaves_out():
    """Transformers 5.23 takes 10,000 where the config names none; 4.37, 4.50 and Adept's code 25,000."""
    transformers = pytest.importorskip("transformers")
    silent = {key: value for key, value in PERSIMMON.tiny.items() if key not in ("rope_theta", "model_type")}
    ids, _ = inputs(101)
    ours = persimmon.PersimmonForCausalLM(read(persimmon.PersimmonConfig, silent))
    stated, theirs = PERSIMMON.pair()
    ours.load_state_dict(stated.state_dict())
    assert torch.equal(ours.eval()(ids).logits, stated(ids).logits)
    config = transformers.PersimmonConfig(**silent)
    wrong = transformers.PersimmonForCausalLM._from_config(config, attn_implementation="eager").eval()
    wrong.load_state_dict(theirs.state_dict())
    if config.to_dict()["rope_parameters"]["rope_theta"] == 10000.0:  # as long as that is so
        assert (wrong(ids).logits - ours(ids).logits).abs().max() > 1e-2
        other = PERSIMMON.model(rope_theta=10000.0)
        other.load_state_dict(stated.state_dict())
        assert (wrong(ids).logits - other(ids).logits).abs().max() < 2e-5


# ---- Dynamic scaling


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_dynamic_scaling_with_a_cache_equals_none(padded):
    model = PERSIMMON.model(**DYNAMIC)
    ids, mask = inputs(101, padded)
    options = {"max_new_tokens": 20, "eos_token_id": None}
    cached = model.generate(ids[:, :9], mask[:, :9], **options)
    assert cached.tolist() == model.generate(ids[:, :9], mask[:, :9], use_cache=False, **options).tolist()
    if padded:
        alone = model.generate(ids[:1, PADDED:9], **options)
        assert cached[0, PADDED:].tolist()[: 9 - PADDED] == alone[0].tolist()[: 9 - PADDED]


@torch.no_grad()
def test_dynamic_scaling_does_not_remember_earlier_calls():
    """Transformers 4.37 keeps the base of a longer text for all shorter ones after it."""
    ids, _ = inputs(101)
    fresh = PERSIMMON.model(**DYNAMIC)(ids[:, :15]).logits
    model = PERSIMMON.model(**DYNAMIC)
    assert model(ids).past_key_values is None
    assert torch.equal(model(ids[:, :15]).logits, fresh)
    with pytest.raises(ValueError, match="other frequencies than past_key_values has"):
        model(ids[:, 11:12], past_key_values=model(ids[:, :11]).past_key_values)


# ---- The large output layer


@pytest.mark.parametrize("labelled", ["all", "some", "none"])
def test_the_loss_in_chunks_has_the_value_and_gradient_of_the_whole(labelled):
    ids, _ = inputs(101)
    labels = ids.clone()
    labels[:, : {"all": 0, "some": 15, "none": 23}[labelled]] = -100
    for rows in (3, 10_000):
        model = PERSIMMON.model()
        x = model.model(ids).last_hidden_state
        loss = persimmon.next_token_loss(x, labels, model.lm_head, rows)
        whole = F.cross_entropy(model.lm_head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert loss.isnan() and whole.isnan() if labelled == "none" else abs(loss - whole) < 1e-6
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for a, b in zip(found, torch.autograd.grad(whole, list(model.parameters())), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, equal_nan=True)


def test_a_long_text_never_has_all_its_logits_at_once():
    """4,096 positions of 262,144 tokens would be 4 GB, and their gradient as much."""
    model = PERSIMMON.model()
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.numel() // 101))
    ids = torch.randint(0, 101, (1, 1000))
    output = model(ids, labels=ids, logits_to_keep=1)
    output.loss.backward()
    assert max(rows) == 256 and output.logits.shape == (1, 1, 101)
    rows.clear()
    model.generate(ids, max_new_tokens=3, eos_token_id=None)
    assert rows == [1, 1, 1]


def test_float16_overflows_only_where_the_reference_does():
    """relu2 of more than 256: the docstring says that fine-tuning wants bfloat16."""
    for scale in (1, 30, 3000):
        ours, theirs = PERSIMMON.pair(dtype=torch.float16)
        for model in (ours, theirs):
            for name, p in model.named_parameters():
                if "dense_h_to_4h" in name:
                    p.data *= scale
        ids, _ = inputs(101)
        a, b = (model(ids).logits.isfinite() for model in (ours, theirs))
        assert (a >= b).all() and (scale < 3000 or not b.all())


# ---- Configs


@pytest.mark.parametrize(("change", "message"), [
    ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 48"),
    ({"partial_rotary_factor": 0.3}, "partial_rotary_factor 0.3 turns 3 dimensions of a head"),
    ({"rope_theta": 0}, "rope_theta must be a positive number"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "has none of the types linear, dynamic"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number above 1, not 0.5"),
    ({**DYNAMIC, "partial_rotary_factor": 0.17}, "dynamic rope_scaling needs more than 2 rotary dimensions"),
    ({"hidden_act": "relu3"}, "hidden_act 'relu3'"),
    ({"hidden_size": None}, "hidden_size must be a positive integer"),
    ({"model_type": "phi"}, "model_type 'phi' is not persimmon"),
])  # fmt: skip
def test_configs_that_cannot_be_honoured_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PERSIMMON.config(**change)


@pytest.mark.parametrize("name", ["persimmon-8b-base", "persimmon-8b-chat"])
def test_real_configs_have_the_published_size(data, name):
    config = read(persimmon.PersimmonConfig, json.loads((data / "configs" / f"{name}.json").read_text()))
    with torch.device("meta"):
        model = persimmon.PersimmonForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 9_397_175_296
    assert config.rotary_dim == 32 and config.eos_token_id == 71013 and config.rope_theta == 25000.0
    assert len(model.state_dict()) == 36 * 16 + 4


def test_what_transformers_5_writes_is_read(tmp_path):
    ours, theirs = PERSIMMON.pair(rope_scaling={"type": "linear", "factor": 2.0})
    theirs.save_pretrained(tmp_path)
    loaded = weights.load(persimmon.PersimmonForCausalLM, tmp_path)
    ids, _ = inputs(101)
    assert torch.equal(loaded(ids).logits, ours(ids).logits) and loaded.config.rope_theta == 25000.0


# ---- Adept's own release

ARGS = {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 4, "padded_vocab_size": 101,
        "max_position_embeddings": 67, "layernorm_epsilon": 1e-5, "rotary_pct": 0.5, "rotary_emb_base": 25000.0,
        "sq_relu": True, "untie_embeddings": True, "qk_layernorm": "weights_per_layer", "params_dtype": torch.bfloat16}  # fmt: skip


@pytest.fixture
def adept(monkeypatch):
    """The modules whose classes Adept's pickle names, as long as it is written."""

    def module(name: str, **contents):
        made = types.ModuleType(name)
        for key, value in contents.items():
            value.__module__, value.__qualname__ = name, key
            setattr(made, key, value)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    module("tool_use")
    module("tool_use.megatron")
    backend = module(
        "tool_use.megatron.megatron_utils", ModelBackend=enum.Enum("ModelBackend", ["MEGATRON"])
    ).ModelBackend
    module("megatron")
    module("megatron.model")
    kind = module("megatron.model.enums", ModelType=enum.Enum("ModelType", ["encoder_or_decoder"])).ModelType

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in ("tool_use", "megatron")]:
            monkeypatch.delitem(sys.modules, name)

    return {"model_backend": backend.MEGATRON, "model_type": kind.encoder_or_decoder}, forget


def nested(state: dict) -> dict:
    """As Megatron stores it: dictionaries whose innermost keys have dots themselves."""
    encoder, embedding, head = {}, {}, {}
    for name, tensor in state.items():
        name = name.replace(".self_attn.", ".self_attention.")
        if name.startswith("model.embed_tokens."):
            embedding[name.removeprefix("model.embed_tokens.")] = tensor
        elif name.startswith("lm_head."):
            head[name.removeprefix("lm_head.")] = tensor
        else:
            encoder[name.removeprefix("model.")] = tensor
    encoder["layers.0.self_attention.rotary_emb.inv_freq"] = torch.ones(3)
    return {
        "language_model": {"embedding": {"word_embeddings": embedding}, "encoder": encoder},
        "word_embeddings_for_head": head,
    }


def release(folder, model, extra, changes=None, **content):
    """A folder exactly as Adept's archive unpacks."""
    rank = folder / "iter_0001251" / "mp_rank_00"
    rank.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1251")
    args = argparse.Namespace(**{**ARGS, **extra, **(changes or {})})
    import numpy

    random_state = [
        {"np_rng_state": numpy.random.RandomState(0).get_state(), "torch_rng_state": torch.get_rng_state()}
    ]
    whole = {"model": nested(model.state_dict()), "args": args, "iteration": 1251, "checkpoint_version": 3.0,
             "rng_state": random_state, **content}  # fmt: skip
    torch.save(whole, rank / "model_optim_rng.pt")
    return folder


def test_adepts_release_loads(tmp_path, adept):
    model = PERSIMMON.model(dtype=torch.bfloat16)
    extra, forget = adept
    folder = release(tmp_path, model, extra)
    forget()  # a user does not have Adept's code
    loaded = weights.load(persimmon.PersimmonForCausalLM, folder)
    assert equal(loaded, model) and loaded.lm_head.weight.dtype == torch.bfloat16
    for key in PERSIMMON.tiny.keys() - {
        "model_type",
        "bos_token_id",
        "eos_token_id",
        "max_position_embeddings",
    }:
        assert getattr(loaded.config, key) == PERSIMMON.tiny[key]
    (folder / "config.json").write_text(json.dumps(PERSIMMON.tiny))
    assert equal(weights.load(persimmon.PersimmonForCausalLM, folder), model)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rotary_emb_base": 10000}, "config.json has rope_theta 25000.0, not 10000 as model_optim_rng.pt says"),
    ({"num_layers": 4}, "num_hidden_layers 3, not 4"),
    ({"sq_relu": False}, "of another model: sq_relu is False"),
    ({"qk_layernorm": "weights_per_head"}, "of another model: qk_layernorm is 'weights_per_head'"),
])  # fmt: skip
def test_the_arguments_of_a_release_are_checked(tmp_path, adept, changes, message):
    extra, forget = adept
    folder = release(tmp_path, PERSIMMON.model(), extra, changes)
    (folder / "config.json").write_text(json.dumps(PERSIMMON.tiny))
    with pytest.raises(ValueError, match=message):
        weights.load(persimmon.PersimmonForCausalLM, folder)


class Innocent:
    """What a hostile pickle would ask for, were it less obvious."""

    ran = False

    def __reduce__(self):
        return (Innocent.run, ())

    @staticmethod
    def run():
        Innocent.ran = True


def test_any_other_class_is_refused_by_name_before_anything_runs(tmp_path, adept):
    extra, _ = adept
    folder = release(tmp_path, PERSIMMON.model(), extra, opt_param_scheduler=Innocent())
    with pytest.raises(ValueError, match=r"it asks for .*test_persimmon.Innocent; nothing was run") as caught:
        weights.load(persimmon.PersimmonForCausalLM, folder)
    assert not Innocent.ran and "\n" not in str(caught.value)


def spoil(folder, how):
    file = folder / "iter_0001251" / "mp_rank_00" / "model_optim_rng.pt"
    if how == "no file":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif how == "two ranks":
        (folder / "iter_0001251" / "mp_rank_01").mkdir()
    elif how == "elsewhere":
        (folder / "latest_checkpointed_iteration.txt").write_text("../../etc")
    elif how == "another iteration":
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
    elif how == "no model":
        torch.save({"args": argparse.Namespace(**ARGS)}, file)
    elif how == "no tensors":
        torch.save({"model": {"language_model": 3}, "args": argparse.Namespace(**ARGS)}, file)
    elif how == "no arguments":
        torch.save({"model": {"x": torch.ones(1)}, "args": argparse.Namespace()}, file)


@pytest.mark.parametrize(("how", "message"), [
    ("no file", "model_optim_rng.pt is missing"), ("cut", "not a sound release"), ("two ranks", "split over several ranks"),
    ("elsewhere", "must hold the number of an iteration"), ("another iteration", "iter_0000007.* is missing"),
    ("no model", "not a sound release"), ("no tensors", "language_model is a int"), ("no arguments", "its arguments lack num_layers"),
])  # fmt: skip
def test_broken_releases_are_one_clear_line(tmp_path, adept, how, message):
    extra, _ = adept
    folder = release(tmp_path, PERSIMMON.model(), extra)
    spoil(folder, how)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        weights.load(persimmon.PersimmonForCausalLM, folder)
    assert "\n" not in str(caught.value)


# ---- Tokenizer and chat


@pytest.fixture(scope="module")
def synthetic(data):
    return tokenize.load(data / "hub" / "persimmon-synthetic")


def test_chat_is_adepts(synthetic):
    end = synthetic.eos_token_id
    assert synthetic.bytes_of[end] == b"|ENDOFTEXT|"
    turns = [
        {"role": "user", "content": " Why? "},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Oh"},
    ]
    for n, text in ((1, "human: Why?\n\nadept:"), (3, "human: Why?\n\nadept: So.\n\nhuman: Oh\n\nadept:")):
        ids = synthetic.chat(turns[:n])
        assert ids == [end, *synthetic.encode(text, add_special_tokens=False)] == synthetic.encode(text)
    with pytest.raises(ValueError, match="no role 'system'"):
        synthetic.chat([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    "typed", ["|ENDOFTEXT|", "|SPEAKER|", "<s>", "<0x04>", "<unk>", "||SPEAKER||NEWLINE|", "x|NEWLINE|y"]
)
def test_what_a_user_types_stays_text(synthetic, typed):
    """In a unigram vocabulary these are pieces like any other, so that not marking them would not be enough."""
    ids = synthetic.chat([{"role": "user", "content": f"a {typed} b"}])
    assert not [
        id
        for id in ids[1:]
        if synthetic.bytes_of[id] in (b"|ENDOFTEXT|", b"|SPEAKER|", b"|NEWLINE|", b"<s>", b"<unk>", b"<0x04>")
    ]
    assert typed in synthetic.decode(ids)


def test_an_answer_ends_before_the_next_question(synthetic):
    assert synthetic.chat_stops == ("\n\nhuman:",)
    for text in (
        "Yes.\n\nhuman: And",
        "Yes.\n\nhuman:",
        "Yes.\n\nhum",
        "Yes.\n\n",
        "Yes.",
        "\n\nhuman:",
        "Yes.\n\nhuman: x\n\nhuman: y",
    ):
        for size in (1, 2, 5):
            ids, written = synthetic.encode(text, add_special_tokens=False), []
            stream = synthetic.stream(written.append, stops=synthetic.chat_stops)
            pieces = [stream.put(ids[i : i + size]) for i in range(0, len(ids), size)] + [stream.end()]
            assert "".join(pieces) == "".join(written) == text.split("\n\nhuman:")[0]
            assert stream.stopped == ("\n\nhuman:" in text)


def test_a_release_brings_its_vocabulary(data, tmp_path, adept):
    source = data / "hub" / "persimmon-synthetic"
    (tmp_path / "adept_vocab.model").write_bytes((source / "tokenizer.model").read_bytes())
    ours, theirs = tokenize.load(tmp_path), tokenize.load(source)
    for text in ("Hello world", "a|ENDOFTEXT|b", " |ENDOFTEXT| x"):
        assert ours.encode(text, False)[0] == theirs.encode(text, False)[0]
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.chat([{"role": "user", "content": "Hi"}]) == theirs.chat([{"role": "user", "content": "Hi"}])


def test_folders_of_both_layouts_load(tmp_path):
    folder = folders.write_config(tmp_path, PERSIMMON)
    folders.safetensors_shards(folder, folders.weights_of(PERSIMMON))
    assert equal(weights.load(persimmon.PersimmonForCausalLM, folder), PERSIMMON.model())
