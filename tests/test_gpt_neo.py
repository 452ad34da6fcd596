"""What only GPT-Neo has."""

import json

import pytest
import torch

from decoders import gpt_neo, phi3
from decoders.kernels.attention import attention
from tests.families import GPT_NEO, inputs, read


def test_head_mask_zero_equals_a_head_without_output():
    """Transformers 5 takes head_mask and ignores it; 4.x multiplies the attention weights, as here."""
    model = GPT_NEO.model()
    ids, _ = inputs(101)
    masked = model(ids, head_mask=torch.tensor([1.0, 1, 0, 1])).logits
    per_layer = model(ids, head_mask=torch.tensor([[1.0, 1, 0, 1]] * 3)).logits
    for block in model.transformer.h:
        block.attn.attention.out_proj.weight.data[:, 24:36] = 0
    expected = model(ids).logits
    torch.testing.assert_close(masked, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(per_layer, expected, atol=2e-5, rtol=0)
    assert not torch.allclose(GPT_NEO.model()(ids).logits, expected, atol=1e-2)


def test_head_mask_may_be_fractional_and_differ_by_layer():
    model = GPT_NEO.model()
    ids, _ = inputs(101)
    mask = torch.rand(3, 4)
    weights = model(ids, head_mask=mask, output_attentions=True).attentions
    for layer in range(3):
        torch.testing.assert_close(weights[layer].sum(-1), mask[layer].view(1, 4, 1).expand(2, 4, 23))


def test_local_layers_see_their_window_and_no_more():
    """Window 5 counts the token itself, so token 9 sees 5 to 9."""
    weights = GPT_NEO.model()(inputs(101)[0], output_attentions=True).attentions
    assert (weights[0][:, :, 9, :10] > 0).all()
    for layer in (1, 2):
        assert (weights[layer][:, :, 9, 5:10] > 0).all() and (weights[layer][:, :, 9, :5] == 0).all()


def test_a_decoding_step_of_a_local_layer_reads_its_window_only():
    """NaN in all older keys and values of the local layers goes unnoticed."""
    model = GPT_NEO.model()
    ids, _ = inputs(101)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        expected = model(ids).logits[:, -1]
        with torch.no_grad():
            cache = model(ids[:, :-1]).past_key_values
            for layer in (1, 2):
                for past in cache[layer]:
                    past[:, :, :-4] = torch.nan
            found = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, expected, atol=2e-5 if dtype == torch.float32 else 0.1, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("T", "S"), [(60, 60), (50, 60), (7, 60), (6, 60), (23, 23)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_loaded_models_local_layers_score_no_more_than_two_windows_at_once(T, S, padded, monkeypatch):
    """And compute the same; a mask that opens more than the window is believed."""
    q, (k, v) = torch.randn(2, 4, T, 12), torch.randn(2, 2, 4, S, 12)
    mask = torch.ones(2, S, dtype=torch.long)
    mask[0, :20] = 1 - padded
    bias = gpt_neo.local_mask(T, S, 5, mask if padded else None, q, False)
    widest = []

    def plain(q, k, v, bias, *rest):
        widest.append((q.shape[2], k.shape[2]))
        return phi3.grouped_query_attention(q, k, v, bias, *rest)

    found, _ = attention(plain, 5, q, k, v, bias, 1.0)
    torch.testing.assert_close(found, phi3.grouped_query_attention(q, k, v, bias, 1.0)[0], atol=1e-5, rtol=0)
    assert sum(queries for queries, _ in widest) == T and max(widest) <= (5, 9)
    bias[:, :, -1, 0], widest[:] = 0.0, []
    found, _ = attention(plain, 5, q, k, v, bias, 1.0)
    torch.testing.assert_close(found, phi3.grouped_query_attention(q, k, v, bias, 1.0)[0], atol=1e-5, rtol=0)
    assert widest == [(T, S)]


def test_plain_causal_attention_needs_no_mask():
    for T, S, window in ((9, 9, None), (1, 9, None), (9, 9, 9), (1, 5, 5)):
        assert gpt_neo.local_mask(T, S, window, None, torch.zeros(1), False) is None
    assert gpt_neo.local_mask(1, 300, 5, torch.ones(2, 300), torch.zeros(2), False).shape == (
        2,
        1,
        1,
        5,
    )


@pytest.mark.parametrize("window", [1, 2, 22, 23, 24, 67])
def test_any_window_agrees_with_the_reference(window):
    ours, theirs = GPT_NEO.pair(window_size=window)
    ids, mask = inputs(101, padded=True)
    for m in (None, mask):
        difference = (ours(ids, attention_mask=m).logits - theirs(ids, attention_mask=m).logits).abs()
        assert difference[1].max() < 2e-5 and difference[0, 4:].max() < 2e-5


def test_attention_layers_win_over_attention_types():
    """The hub's files hold both; Transformers lets the list win, so a wrong pair must not go by the other."""
    layers = ["local", "local", "global"]
    ours, theirs = GPT_NEO.pair(attention_layers=layers)
    assert ours.config.attention_layers == layers == theirs.config.attention_layers
    ids, _ = inputs(101)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 2e-5


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": -48}, "hidden_size must be a positive integer, not -48"),
    ({"hidden_size": 48.5}, "hidden_size must be a positive integer, not 48.5"),
    ({"vocab_size": True}, "vocab_size must be a positive integer"),
    ({"num_heads": 7}, "num_heads 7 does not divide hidden_size 48"),
    ({"num_layers": 4}, "num_layers 4, but attention_layers has 3"),
    ({"window_size": 0}, "window_size must be a positive integer"),
    ({"intermediate_size": 0}, "intermediate_size must be"),
    ({"activation_function": "gelu_neu"}, "activation_function 'gelu_neu' is not one of gelu"),
    ({"attention_types": [[["global", "lokal", "local"], 1]]}, "global and local only"),
    ({"attention_types": 3}, "attention_types is no list"),
    ({"resid_dropout": 1.5}, "resid_dropout must be a number from 0 to 1"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be"),
    ({"problem_type": "guessing"}, "problem_type 'guessing'"),
    ({"model_type": "gptj"}, "model_type 'gptj' is not gpt_neo"),
    ({"quantization_config": {"quant_method": "quip", "bits": 4}}, "quant_method 'quip' is not supported"),
])  # fmt: skip
def test_configs_that_cannot_be_honoured_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GPT_NEO.config(**change)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_layers", "num_heads", "max_position_embeddings",
                                   "attention_types"])  # fmt: skip
def test_a_missing_field_is_never_a_default(field):
    config = {key: value for key, value in GPT_NEO.tiny.items() if key != field}
    with pytest.raises(ValueError, match=f"lacks {field}"):
        read(gpt_neo.GPTNeoConfig, config)


def test_other_names_and_labels():
    tiny = dict(GPT_NEO.tiny)
    renamed = {"num_hidden_layers": tiny.pop("num_layers"), "num_attention_heads": tiny.pop("num_heads")}
    config = read(
        gpt_neo.GPTNeoConfig, {**tiny, **renamed, "id2label": {"0": "a", "1": "b", "2": "c"}, "n": 1}
    )
    assert (config.num_layers, config.num_heads, config.num_labels) == (3, 4, 3)
    assert read(gpt_neo.GPTNeoConfig, config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "parameters"), [("gpt-neo-125m", 125_198_592), ("gpt-neo-1.3B", 1_315_575_808)]
)
def test_real_configs_have_the_published_size(data, name, parameters):
    config = read(gpt_neo.GPTNeoConfig, json.loads((data / "configs" / f"{name}.json").read_text()))
    with torch.device("meta"):
        model = gpt_neo.GPTNeoForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.attention_layers == ["global", "local"] * (config.num_layers // 2)


def test_defaults_are_transformers_own():
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.GPTNeoConfig(), gpt_neo.GPTNeoConfig()
    for key, value in ours.to_dict().items():
        if key not in ("intermediate_size", "num_labels"):  # ours holds the 8192 that theirs computes later
            assert getattr(theirs, key) == value, key
