"""What only OpenAI GPT has: two heads, its own file formats, a cache that nobody else gives it."""

import json

import pytest
import torch

from decoders import openai_gpt, tokenize, weights
from tests import folders
from tests.families import OPENAI_GPT, inputs, read, redraw
from tests.test_weights import equal

DOUBLE = "DoubleHeadsModel"


def choices():
    """(2, 3, 11) ids, and which token of each choice is read."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 101, (2, 3, 11), generator=generator)
    return ids, torch.randint(0, 11, (2, 3), generator=generator)


def theirs_from(ours, **changes):
    transformers = pytest.importorskip("transformers")
    config = {k: v for k, v in {**OPENAI_GPT.tiny, **changes}.items() if k != "model_type"}
    theirs = transformers.OpenAIGPTDoubleHeadsModel(transformers.OpenAIGPTConfig(**config))
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


@pytest.mark.parametrize("activation", [None, "tanh", "relu"])
def test_double_heads_agree(activation):
    ours = OPENAI_GPT.model(DOUBLE, summary_activation=activation)
    theirs = theirs_from(ours, summary_activation=activation)
    ids, places = choices()
    labels, right = ids.masked_fill(ids < 9, -100), torch.tensor([2, 0])
    for options in ({}, {"mc_token_ids": places}, {"mc_token_ids": places, "token_type_ids": ids.flip(2)}):
        a = ours(
            ids, labels=labels, mc_labels=right, output_hidden_states=True, output_attentions=True, **options
        )
        b = theirs(
            ids, labels=labels, mc_labels=right, output_hidden_states=True, output_attentions=True, **options
        )
        for key in ("loss", "mc_loss", "logits", "mc_logits"):
            assert (getattr(a, key) - b[key]).abs().max() < 2e-5, key
        for key in ("hidden_states", "attentions"):
            for x, y in zip(getattr(a, key), b[key], strict=True):
                assert (x - y.view_as(x)).abs().max() < 2e-5, (
                    key
                )  # theirs: (B * M, T, C), and the last (B, M, T, C)
    (a.loss + a.mc_loss).backward()
    (b["loss"] + b["mc_loss"]).backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - gradients[name].grad).abs().max() < 1e-5, name


@pytest.mark.parametrize(("kind", "pool"), [
    ("last", lambda x: x[:, :, -1]), ("first", lambda x: x[:, :, 0]), ("mean", lambda x: x.mean(2)),
])  # fmt: skip
def test_pooling_goes_over_the_tokens_of_each_choice(kind, pool):
    """Transformers pools axis 1, the choices: its mc_logits are (B, T), and the loss compares tokens."""
    ours = OPENAI_GPT.model(DOUBLE, summary_type=kind)
    ids, places = choices()
    output = ours(ids, mc_token_ids=places, output_hidden_states=True)
    head = ours.multiple_choice_head.summary
    expected = (pool(output.hidden_states[-1]) @ head.weight[0]) + head.bias
    torch.testing.assert_close(output.mc_logits, expected, atol=1e-5, rtol=0)
    wrong = theirs_from(ours, summary_type=kind)(ids, mc_token_ids=places)["mc_logits"]
    assert output.mc_logits.shape == (2, 3) and wrong.shape != (2, 3)


def test_summary_dropouts_act_in_training_only():
    ids, places = choices()
    for rate in ("summary_first_dropout", "summary_last_dropout"):
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
        model = OPENAI_GPT.model(DOUBLE, **{**none, rate: 0.5}).train()
        assert not torch.equal(model(ids).mc_logits, model(ids).mc_logits)
        assert torch.equal(model.eval()(ids).mc_logits, model(ids).mc_logits)


def test_double_heads_refuse_what_has_no_meaning():
    for key in ("summary_use_proj", "summary_proj_to_labels"):
        with pytest.raises(ValueError, match="one number a choice"):
            OPENAI_GPT.model(DOUBLE, **{key: False})
    with pytest.raises(ValueError, match="batch, choices, tokens"):
        OPENAI_GPT.model(DOUBLE)(torch.zeros(2, 3, dtype=torch.long))
    config = OPENAI_GPT.config(num_labels=5)
    OPENAI_GPT.cls(DOUBLE)(config)
    assert config.num_labels == 5, "the config is the caller's: Transformers sets it to 1"


def test_choices_may_be_padded():
    ours = OPENAI_GPT.model(DOUBLE)
    ids, places = choices()
    mask = torch.ones_like(ids)
    mask[0, 1, 7:] = 0
    places = places.clamp(max=6)
    a = ours(ids, attention_mask=mask, mc_token_ids=places).mc_logits
    b = ours(ids[:, :, :7], mc_token_ids=places).mc_logits
    torch.testing.assert_close(a[0, 1], b[0, 1], atol=1e-5, rtol=0)


def test_gelu_new_is_the_same_as_gelu():
    """The documentation offers gelu_new; Transformers knows only "gelu", by which it means the same."""
    ids, _ = inputs(101)
    a, b, c = (OPENAI_GPT.model(afn=name)(ids).logits for name in ("gelu", "gelu_new", "silu"))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2)


@pytest.mark.parametrize(("change", "message"), [
    ({"n_embd": -48}, "n_embd must be a positive integer, not -48"),
    ({"n_head": 7}, "n_head 7 does not divide n_embd 48"),
    ({"afn": "gelu_neu"}, "afn 'gelu_neu' is not one of"),
    ({"summary_type": "attn"}, "summary_type 'attn' is not one of"),
    ({"summary_activation": "tahn"}, "summary_activation 'tahn'"),
    ({"attn_pdrop": float("nan")}, "attn_pdrop must be a number from 0 to 1"),
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not openai-gpt"),
])  # fmt: skip
def test_configs_that_cannot_be_honoured_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OPENAI_GPT.config(**change)


@pytest.mark.parametrize("name", ["openai-gpt", "openai-gpt.edited-copy"])
def test_real_configs_have_the_published_size(data, name):
    config = read(openai_gpt.OpenAIGPTConfig, json.loads((data / "configs" / f"{name}.json").read_text()))
    with torch.device("meta"):
        model = openai_gpt.OpenAIGPTLMHeadModel(config)
    assert sum(p.numel() for p in model.parameters()) == 116_534_784


def test_defaults_are_transformers_own():
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.OpenAIGPTConfig(), openai_gpt.OpenAIGPTConfig()
    for key, value in ours.to_dict().items():
        if key not in ("summary_last_dropout", "num_labels", "use_cache"):
            assert getattr(theirs, key) == value, key


# ---- Its file formats


def wide_state():
    """Heads of size 64, as OpenAI's release does not tell their number."""
    sizes = {"n_embd": 128, "n_head": 2, "vocab_size": 97, "n_positions": 31}
    model = redraw(openai_gpt.OpenAIGPTLMHeadModel(OPENAI_GPT.config(**sizes))).eval()
    return model, dict(model.transformer.state_dict())


def write_release(folder, state, **spoil):
    """OpenAI's layout: all arrays in one vector, cut into ten files at arbitrary places."""
    numpy = pytest.importorskip("numpy")
    parts = [f"{p}.{leaf}" for p in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
             for leaf in ("weight", "bias")]  # fmt: skip
    names = [
        "positions_embed.weight",
        "tokens_embed.weight",
        *(f"h.{i}.{p}" for i in range(3) for p in parts),
    ]
    shapes = [
        [1, *state[n].shape] if state[n].dim() == 2 and "embed" not in n else list(state[n].shape)
        for n in names
    ]
    vector = torch.cat([state[n].flatten() for n in names]).numpy()
    for i, piece in enumerate(numpy.array_split(vector, 10)):
        numpy.save(folder / f"params_{i}.npy", piece)
    (folder / "params_shapes.json").write_text(json.dumps(shapes))


def test_openais_release_loads(tmp_path):
    model, state = wide_state()
    write_release(tmp_path, state)
    loaded = weights.load(openai_gpt.OpenAIGPTLMHeadModel, tmp_path)
    assert equal(loaded, model) and loaded.config.n_head == 2
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: (f / "params_7.npy").unlink(), "params_7.npy is missing"),
    (lambda f: (f / "params_2.npy").write_bytes(b"no numpy file"), "params_2.npy is not a sound numpy file"),
    (lambda f: (f / "params_3.npy").write_bytes((f / "params_4.npy").read_bytes()[:200]), "params_3.npy is not a sound"),
    (lambda f: __import__("numpy").save(f / "params_9.npy", __import__("numpy").zeros(3, "float32")), "numbers in all"),
    (lambda f: (f / "params_shapes.json").write_text("[[31, 128], [97, 128], [5]]"), "not the list of shapes"),
    (lambda f: (f / "params_shapes.json").write_text('{"a": 1}'), "not the list of shapes"),
    (lambda f: __import__("numpy").save(f / "params_1.npy", __import__("numpy").array([{}], dtype=object)), "not a sound numpy"),
])  # fmt: skip
def test_broken_releases_are_one_clear_line(tmp_path, spoil, message):
    write_release(tmp_path, wide_state()[1])
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        weights.load(openai_gpt.OpenAIGPTLMHeadModel, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("head", ["LMHeadModel", DOUBLE, "ForSequenceClassification"])
def test_tensorflow_files_load(tmp_path, head):
    pytest.importorskip("h5py")
    model = OPENAI_GPT.model(head)
    folder = folders.write_config(tmp_path, OPENAI_GPT)
    folders.tensorflow(folder, model.state_dict(), head)
    assert equal(weights.load(OPENAI_GPT.cls(head), folder), model)


def test_broken_tensorflow_files_are_said(tmp_path):
    pytest.importorskip("h5py")
    folder = folders.write_config(tmp_path, OPENAI_GPT)
    (folder / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="not a sound HDF5 file"):
        weights.load(OPENAI_GPT.cls(), folder)


# ---- The documentation's examples


def test_a_cls_token_new_rows_and_two_choices(tmp_path):
    ours = OPENAI_GPT.model(DOUBLE)
    before = ours.transformer.tokens_embed.weight.detach().clone()
    ids, places = choices()
    expected = ours(ids).mc_logits
    weights.resize_embeddings(ours, 103)
    assert ours.config.vocab_size == 103 and ours.lm_head.weight is ours.transformer.tokens_embed.weight
    assert torch.equal(ours.transformer.tokens_embed.weight[:101], before)
    torch.testing.assert_close(ours.transformer.tokens_embed.weight[101:], before.mean(0).expand(2, 48))
    assert torch.equal(ours(ids).mc_logits, expected) and ours(ids).logits.shape[-1] == 103
    with_cls = torch.cat([ids, torch.full((2, 3, 1), 102)], 2)
    assert ours(with_cls, mc_token_ids=torch.full((2, 3), 11)).mc_logits.shape == (2, 3)
    weights.save(ours, tmp_path)
    assert equal(weights.load(OPENAI_GPT.cls(DOUBLE), tmp_path), ours)
    weights.resize_embeddings(ours, 50)
    assert torch.equal(ours.transformer.tokens_embed.weight, before[:50])
    with pytest.raises(ValueError, match="0 rows"):
        weights.resize_embeddings(ours, 0)


def test_the_cls_token_of_the_documentation(data):
    tokenizer = tokenize.load(data / "hub" / "openai-gpt")
    assert tokenizer.add_special_tokens(["[CLS]"]) == 1 and len(tokenizer) == 40479
    ids = tokenizer.encode("Hello, my dog is cute [CLS]")
    assert ids[-1] == 40478 and tokenizer.decode(ids) == "hello , my dog is cute [CLS]"
