"""`generate` calls what stands on the model: overridden, set on the object, hooked, or put there by peft."""

import copy
import warnings

import pytest
import torch

from decoders import hf, weights
from tests.families import OPENAI_GPT, PHI, inputs

OPTIONS = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def documented(family, path, **options):
    weights.save(family.model(), path)
    return getattr(hf, family.class_name()).from_pretrained(path, **options)


# ---- Once a token ------------------------------------------------------------------------------------------


def test_what_is_set_on_the_object_is_called_once_a_token(family, tmp_path):
    """`generate` went over the plain model and called neither."""
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    right, calls = model.generate(ids, **OPTIONS), []
    prepare, forward = model.prepare_inputs_for_generation, model.forward

    def preparing(*args, **kwargs):
        calls.append("prepare")
        return prepare(*args, **kwargs)

    def passing(*args, **kwargs):
        calls.append("forward")
        return forward(*args, **kwargs)

    model.prepare_inputs_for_generation, model.forward = preparing, passing
    for settings in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}):
        calls.clear()
        found = model.generate(ids, **OPTIONS, **settings)
        assert calls == ["prepare", "forward"] * 6
        assert "num_beams" in settings or torch.equal(found, right)
    del model.prepare_inputs_for_generation
    calls.clear()
    assert torch.equal(model.generate(ids, **OPTIONS), right) and calls == ["forward"] * 6


def test_a_hook_sees_and_changes_the_documented_output(family, tmp_path):
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    seen = []

    def hook(part, args, output):
        seen.append(type(output))
        output.logits = torch.zeros_like(output.logits).index_fill(-1, torch.tensor([7]), 9.0)
        return output

    handle = model.register_forward_hook(hook)
    assert model.generate(ids, **OPTIONS)[:, 23:].eq(7).all() and seen == [hf.ModelOutput] * 6
    handle.remove()
    assert not model.generate(ids, **OPTIONS)[:, 23:].eq(7).all()


def test_an_overridden_method_is_called(tmp_path):
    class Shouting(hf.PhiForCausalLM):
        prepared = 0

        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            self.prepared += 1
            return super().prepare_inputs_for_generation(input_ids, **kwargs)

    weights.save(PHI.model(), tmp_path)
    model, (ids, mask) = Shouting.from_pretrained(tmp_path), inputs(101, padded=True)
    right = hf.PhiForCausalLM.from_pretrained(tmp_path).generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(model.generate(ids, attention_mask=mask, **OPTIONS), right) and model.prepared == 6


# ---- peft --------------------------------------------------------------------------------------------------


def tuned(model, kind: str):
    """The model under virtual tokens that are drawn far from all others."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "prompt_encoder" in name:
                p.copy_(torch.randn(p.shape) * (3 if kind == "PromptTuningConfig" else 1))
    return model


@torch.no_grad()
@pytest.mark.ecosystem
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_a_tuned_prompt_generates_what_its_own_passes_say(family, tmp_path, kind):
    """The text was that of the model without its prompt."""
    if family is OPENAI_GPT and kind == "PrefixTuningConfig":
        pytest.skip("OpenAI GPT has no cache in Transformers")
    model, ids = tuned(documented(family, tmp_path), kind), inputs(101)[0][:, :9]
    record = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    found, plain = model.generate(input_ids=ids, **record), model.get_base_model().generate(ids, **record)
    for n, (logits, untuned) in enumerate(zip(found.logits, plain.logits, strict=True)):
        text = found.sequences[:, : 9 + n]
        right = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[:, -1]
        torch.testing.assert_close(logits, right, atol=1e-4, rtol=1e-4)
        assert (logits - untuned).abs().max() > 0.01


def say_past_key_values(model) -> None:
    """What peft 0.21.2 reads in what Transformers prepares, which 5.24 calls `cache`. It finds none there, and puts
    its virtual tokens before every new one: cached generation writes other text than its own passes say, with all
    three kinds. Ours has both names."""
    prepare = model.base_model_prepare_inputs_for_generation

    def prepared(*args, **kwargs):
        given = prepare(*args, **kwargs)
        if "cache" in given:
            given["past_key_values"] = given.pop("cache")
        return given

    model.base_model_prepare_inputs_for_generation = prepared


@torch.no_grad()
@pytest.mark.ecosystem
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_a_tuned_prompt_generates_what_transformers_generates(family, tmp_path, kind, padded):
    transformers = pytest.importorskip("transformers")
    if family is OPENAI_GPT:
        pytest.skip("OpenAI GPT has no cache in Transformers")
    theirs = getattr(transformers, family.class_name())
    ours = tuned(documented(family, tmp_path), kind)
    theirs = tuned(theirs.from_pretrained(tmp_path, dtype=torch.float32), kind)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    say_past_key_values(theirs)
    ids, mask = inputs(101, padded=padded)
    for settings in ({}, {"num_beams": 3}):
        found, right = (
            m.generate(input_ids=ids, attention_mask=mask, **OPTIONS, **settings) for m in (ours, theirs)
        )
        assert torch.equal(found, right)


# ---- What is said ------------------------------------------------------------------------------------------


def test_padding_on_the_right_is_said(family, tmp_path):
    model, (ids, mask) = documented(family, tmp_path), inputs(101, padded=True)
    with pytest.warns(UserWarning, match="padded on the right"):
        model.generate(ids, attention_mask=mask.flip(1), **OPTIONS)
    with pytest.warns(UserWarning, match="padded on the right"):
        model.generate(ids.masked_fill(mask.flip(1) == 0, 99), **{**OPTIONS, "pad_token_id": 99})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, attention_mask=mask, **OPTIONS)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((50,), {}, "second argument of generate is a GenerationConfig, not 50: give max_new_tokens=50"),
        ((), {"streamer": print}, r"streamer must have put\(ids\) and end\(\)"),
        ((), {"assistant_model": "phi"}, "assistant_model must be a model of the same vocabulary, not str"),
    ],
)
def test_wrong_arguments_are_told(family, tmp_path, args, options, message):
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, *args, **options)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 3]], r"input_ids must be a tensor \(batch, tokens\), one token at least, not list"),
        (torch.tensor([1, 2, 3]), r"input_ids must be a tensor \(batch, tokens\)"),
        ("Once upon", "takes token ids, not a text: encode 'Once upon' with the tokenizer"),
    ],
)
def test_what_are_no_ids_is_told(tmp_path, ids, message):
    model = documented(PHI, tmp_path)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, max_new_tokens=2)


def test_the_plain_model_stays_plain(family, tmp_path):
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    plain = copy.deepcopy(model).plain
    assert type(plain) is family.cls("ForCausalLM")
    assert all(not hasattr(type(part), "plain_class") for part in plain.modules())
    assert torch.equal(plain.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
