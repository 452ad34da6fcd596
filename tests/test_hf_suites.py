"""What Transformers' own test suites found when they ran over these classes, each as a test of its own."""

import copy
import pickle

import pytest
import torch
from torch import nn

from decoders import hf, look, weights
from tests.families import FUYU, GPT_NEO, OPENAI_GPT, PHI, inputs

transformers = pytest.importorskip("transformers")


def documented(family, path, head: str = "ForCausalLM", **options):
    weights.save(family.model(head), path)
    return getattr(hf, family.class_name(head)).from_pretrained(path, **options)


# ---- Seen as Transformers' ---------------------------------------------------------------------------------


def test_configs_and_outputs_are_seen_as_transformers(family, tmp_path):
    """`isinstance`, as its Trainer and others ask it; `type` stays ours, and `__class__` makes one of ours."""
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    config = model.config
    assert (
        isinstance(config, transformers.PretrainedConfig) and type(config).__module__ == "decoders.hf.configs"
    )
    again = config.__class__.from_dict(config.to_dict())
    assert type(again) is type(config) and again.to_dict() == config.to_dict()
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is type(config) and other.to_dict() == config.to_dict()
    for beams, name in ((1, "GenerateDecoderOnlyOutput"), (2, "GenerateBeamDecoderOnlyOutput")):
        settings = {"max_new_tokens": 2, "num_beams": beams, "use_cache": True}
        output = model.generate(ids, return_dict_in_generate=True, **settings)
        assert isinstance(output, getattr(transformers.generation, name))
        assert isinstance(output.past_key_values, transformers.Cache)
        assert torch.equal(pickle.loads(pickle.dumps(output)).sequences, output.sequences)


def test_private_names_that_others_read(family, tmp_path):
    model = documented(family, tmp_path)
    names = dict(model.named_parameters(remove_duplicate=False))
    tied = model._tied_weights_keys
    assert all(names[name] is names[other] for name, other in tied.items())
    assert bool(tied) == model.config.tie_word_embeddings
    assert model.vocab_size == model.get_input_embeddings().num_embeddings
    assert [*model._keep_in_fp32_modules] == [] and not model._can_set_experts_implementation()
    assert len(model.config.per_layer_config) == model.config.num_hidden_layers
    inner = [name for name in model.config if isinstance(getattr(model.config, name), hf.PretrainedConfig)]
    assert inner == [*model.config.sub_configs] == (["text_config"] if family is FUYU else [])


# ---- Models ------------------------------------------------------------------------------------------------


def test_checkpointing_of_one_model_is_not_another_models(tmp_path):
    """Activations are parts of all models of GPT-1, and they carried the switch from one to the next."""
    config = hf.OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4)
    first = hf.OpenAIGPTModel(config)
    first.gradient_checkpointing_enable()
    assert first.is_gradient_checkpointing and not hf.OpenAIGPTModel(config).is_gradient_checkpointing
    config.gradient_checkpointing = True  # as configs of 2021 ask for it
    assert hf.OpenAIGPTModel(config).is_gradient_checkpointing


def test_another_attention_is_set_wholly_or_not_at_all(tmp_path):
    model = documented(FUYU, tmp_path)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation must be"):
        model.set_attn_implementation("foo")
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "eager"


def test_a_part_of_a_config_is_read_from_the_whole(tmp_path):
    model = documented(FUYU, tmp_path)
    part = type(model.config.text_config).from_pretrained(tmp_path)
    assert part.to_dict() == hf.FuyuConfig.from_pretrained(tmp_path).text_config.to_dict()
    part.save_pretrained(tmp_path / "part")
    assert type(part).from_pretrained(tmp_path / "part").to_dict() == part.to_dict()


@torch.no_grad()
@pytest.mark.parametrize("kind", [PHI, GPT_NEO], ids=["phi", "gpt_neo"])
@pytest.mark.parametrize("registered", [True, False])
def test_a_model_type_of_ones_own_loads_weights(kind, registered, tmp_path):
    name = f"own-{kind.name}-{registered}"
    model_class = getattr(hf, kind.class_name("ForCausalLM"))
    own_config = type("OwnConfig", (model_class.config_class,), {"model_type": name})
    own_model = type("OwnModel", (model_class,), {"config_class": own_config})
    tiny = {key: value for key, value in kind.tiny.items() if key != "model_type"}
    model, (ids, _) = own_model(own_config(**tiny)).eval(), inputs(101)
    model.save_pretrained(tmp_path)
    loader = own_model
    if registered:
        hf.AutoConfig.register(name, own_config)
        hf.AutoModelForCausalLM.register(own_config, own_model)
        loader = hf.AutoModelForCausalLM
    again = loader.from_pretrained(tmp_path)
    assert type(again) is own_model and type(again.config) is own_config
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=2e-5, rtol=0)


def test_weights_are_not_read_onto_nothing(tmp_path):
    documented(PHI, tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="leave torch.device"):
        hf.PhiForCausalLM.from_pretrained(tmp_path)


def test_a_padding_of_embeddings_is_a_whole_number(tmp_path):
    with pytest.raises(ValueError, match="pad_to_multiple_of must be a whole number"):
        documented(PHI, tmp_path).resize_token_embeddings(99, pad_to_multiple_of=1.3)


# ---- generate ----------------------------------------------------------------------------------------------


def test_a_negative_stop_id_never_stops(family, tmp_path):
    """As scripts write it, in a call or in a GenerationConfig of either library."""
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    right = model.generate(ids, max_new_tokens=8, eos_token_id=None, do_sample=False)
    for eos in (-1, [-1], torch.tensor(-1)):
        assert torch.equal(model.generate(ids, max_new_tokens=8, eos_token_id=eos, do_sample=False), right)
    settings = transformers.GenerationConfig(max_new_tokens=8, eos_token_id=-1, pad_token_id=-1)
    assert torch.equal(model.generate(ids, generation_config=settings, do_sample=False), right)


def test_an_unknown_argument_is_an_error_of_both_kinds(tmp_path):
    model, (ids, _) = documented(PHI, tmp_path), inputs(101)
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match="unexpected keyword argument 'foo'"):
            model.generate(ids, max_new_tokens=2, foo=1)


class Phrase:
    """As Transformers 4 has it."""

    token_ids = (5, 9)


class OneOf:
    class trie:  # noqa: N801
        trie = {5: {9: {}, 7: {8: {}}}, 3: {}}


def test_constraints_of_transformers_4(tmp_path):
    model, (ids, _) = documented(PHI, tmp_path), inputs(101)
    settings = {"num_beams": 4, "max_new_tokens": 6, "do_sample": False}
    pairs = (
        (Phrase(), hf.PhrasalConstraint([5, 9])),
        (OneOf(), hf.DisjunctiveConstraint([[5, 9], [5, 7, 8], [3]])),
    )
    for theirs, ours in pairs:
        found, right = (model.generate(ids, constraints=[one], **settings) for one in (theirs, ours))
        assert torch.equal(found, right)


def test_embeds_go_on_with_the_ids_of_the_last_tokens(family, tmp_path):
    """A text that began with embeddings has ids only of what was generated."""
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    embed = model.get_input_embeddings()
    settings = {"do_sample": False, "return_dict_in_generate": True, "use_cache": True, "eos_token_id": None}
    whole = model.generate(inputs_embeds=embed(ids), max_new_tokens=5, **settings).sequences
    first = model.generate(inputs_embeds=embed(ids), max_new_tokens=3, **settings)
    new = torch.cat([embed(ids), embed(first.sequences)], 1)
    for past in (first.past_key_values, None):
        more = {"inputs_embeds": new, "past_key_values": past, "max_new_tokens": 2}
        assert torch.equal(model.generate(first.sequences, **more, **settings).sequences, whole)
    with pytest.raises(ValueError, match="or of its last tokens"):
        model.generate(new.new_zeros(len(ids), 99).long(), inputs_embeds=new, max_new_tokens=1)


# ---- Sentences ---------------------------------------------------------------------------------------------


def test_sentences_on_what_goes_in(tmp_path):
    model, (ids, _) = documented(PHI, tmp_path), inputs(101)
    with pytest.raises(ValueError, match="labels must be an int64 tensor"):
        model(ids, labels=ids[:, :2])
    with pytest.raises(ValueError, match=r"unpack what the tokenizer gave, generate\(\*\*inputs\)"):
        model.generate(hf.BatchEncoding({"input_ids": ids}), max_new_tokens=2)


def test_a_stage_that_no_trace_has_is_told():
    trace = look.trace(OPENAI_GPT.model().eval(), [[1, 2, 3]])
    with pytest.raises(KeyError) as caught:
        trace["layer.1.out"]
    assert str(caught.value).startswith("the trace has no stage 'layer.1.out', only embeddings, ")
    assert "layers.N.out" in str(caught.value) and "layer.1.out" not in trace and trace.get("x") is None


def test_an_adapter_left_inside_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    documented(PHI, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"base_model.model.{name}": value for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="peft adapter left inside"):
        weights.load(PHI.cls(), tmp_path)


# ---- Quantized caches --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.skipif(not hasattr(transformers.cache_utils, "QuantizedLayer"), reason="has no such layers")
def test_a_quantized_cache_of_transformers(family, tmp_path):
    """Layers that keep what is old in another form: here rounded, so that only they can give these logits."""
    if family is OPENAI_GPT:
        pytest.skip("OpenAI GPT has no cache in Transformers")
    base = transformers.cache_utils.QuantizedLayer

    class Rounded(base):
        def _quantize(self, tensor, axis):
            return (tensor * 4).round()

        def _dequantize(self, tensor):
            return tensor / 4

    ours, (ids, _) = documented(family, tmp_path), inputs(101)
    kind = getattr(transformers, family.class_name())
    theirs = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found, right = (two_passes(model, ids, Rounded) for model in (ours, theirs))
    torch.testing.assert_close(found, right, atol=2e-5, rtol=0)
    assert (found - ours(ids).logits).abs().max() > 1e-3


def two_passes(model: nn.Module, ids, layer_class):
    n = model.config.get_text_config().num_hidden_layers
    cache = transformers.cache_utils.Cache(layers=[layer_class(residual_length=2) for _ in range(n)])
    parts = (ids[:, :5], ids[:, 5:])
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
