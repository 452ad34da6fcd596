"""The documented manners of models, configs and outputs, family by family; what they compute is tested elsewhere."""

import copy
import json
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from decoders import decoding, hf, weights
from decoders.hf.arguments import already_said
from tests import folders, golden_fuyu, hub_cache
from tests.families import GPT_NEO, OPENAI_GPT, PHI, inputs
from tests.hub_cache import CHECKPOINTS
from tests.test_ecosystem import without_dropout
from tests.test_fuyu import GOLDEN, picture

CLOSE = {"atol": 2e-5, "rtol": 0}


def folder_of(family, path, head: str = "ForCausalLM", **changes):
    """A checkpoint of the family's tiny sizes."""
    weights.save(family.model(head, **changes), path / "checkpoint")
    return path / "checkpoint"


def documented(family, path, head: str = "ForCausalLM", **options):
    return getattr(hf, family.class_name(head)).from_pretrained(folder_of(family, path, head), **options)


# ---- Outputs


def test_an_output_leaves_out_what_is_none():
    output = hf.ModelOutput(loss=None, logits=torch.ones(2), attentions=(1,))
    assert list(output) == ["logits", "attentions"] and output[0] is output.logits is output["logits"]
    assert output[1:] == ((1,),) and output.loss is None and output.to_tuple()[-1] == (1,)
    output.loss = torch.zeros(())
    assert "loss" in output and isinstance(output, dict)
    with pytest.raises(AttributeError, match="has no 'logit'"):
        output.logit  # noqa: B018
    for again in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output), type(output)(dict(output))):
        assert list(again) == list(output) and again.hidden_states is None


@torch.no_grad()
def test_places_of_an_output(family, tmp_path):
    model, (ids, mask) = documented(family, tmp_path), inputs(101, padded=True)
    plain = family.model()(ids, attention_mask=mask, labels=ids)
    output = model(ids, attention_mask=mask)
    torch.testing.assert_close(output[0], plain.logits, **CLOSE)
    output = model(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(output[0], plain.loss, **CLOSE)
    assert torch.equal(output[1], output.logits)
    assert ("past_key_values" in output) == (family is not OPENAI_GPT)  # whose documentation knows no cache
    found = model(ids, attention_mask=mask, return_dict=False, output_hidden_states=True)
    assert type(found) is tuple and len(found[-1]) == len(model(ids, output_hidden_states=True).hidden_states)
    model.config.output_attentions = True
    assert model(ids).attentions[0].shape == (2, 4, 23, 23)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


def test_positional_arguments_are_the_documented_ones(family, tmp_path):
    model, (ids, mask) = documented(family, tmp_path), inputs(101)
    names = list(model.takes)
    given = {"input_ids": ids, "attention_mask": mask}
    output = model(*(given.get(name) for name in names[: names.index("attention_mask") + 1]))
    assert torch.equal(output.logits, model(ids, attention_mask=mask).logits)
    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'attention_maks': did you mean 'attention_mask'"
    ):
        model(ids, attention_maks=mask)
    with pytest.raises(TypeError, match="takes"):
        model(*[None] * 30)


# ---- Caches


@torch.no_grad()
def test_a_returned_cache_stays_as_it_is(family, tmp_path):
    """Two branches from one cache: the second one saw the first one's tokens."""
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    whole = [
        model(torch.cat([ids[:, :9], ids[:, i : i + 1]], 1), use_cache=True).logits[:, -1]
        for i in (9, 12, 15)
    ]
    past = model(ids[:, :9], use_cache=True).past_key_values
    before = [part.clone() for layer in past for part in layer]
    for _ in range(2):
        for right, i in zip(whole, (9, 12, 15), strict=True):
            step = model(ids[:, i : i + 1], past_key_values=past, use_cache=True)
            torch.testing.assert_close(step.logits[:, -1], right, **CLOSE)
            longer = model(
                ids[:, 16:18], past_key_values=step.past_key_values, use_cache=True
            ).past_key_values
            assert step.past_key_values.get_seq_length() == 10 and longer.get_seq_length() == 12
    assert all(
        torch.equal(a, b) for a, b in zip(before, (part for layer in past for part in layer), strict=True)
    )
    assert isinstance(past, tuple) and len(past) == 3 and past[0][0].shape[2] == 9
    by_hand = tuple((k.clone(), v.clone()) for k, v in past)
    torch.testing.assert_close(model(ids[:, 9:10], past_key_values=by_hand).logits[:, -1], whole[0], **CLOSE)


@torch.no_grad()
def test_a_dynamic_cache_grows(family, tmp_path):
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    cache = hf.DynamicCache()
    for i in range(5):
        output = model(ids[:, 3 * i : 3 * i + 3], past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache and cache.get_seq_length() == 3 * i + 3
    torch.testing.assert_close(output.logits[:, -1], model(ids[:, :15]).logits[:, -1], **CLOSE)
    cache.crop(9)
    torch.testing.assert_close(
        model(ids[:, 9:15], past_key_values=cache).logits[:, -1], output.logits[:, -1], **CLOSE
    )


# ---- generate


@torch.no_grad()
def test_generate_is_ours(family, tmp_path):
    model, (ids, mask) = documented(family, tmp_path), inputs(101, padded=True)
    plain = family.model()
    for settings in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 7}, {"repetition_penalty": 1.4}):
        torch.manual_seed(3)
        right = decoding.generate(plain, ids, mask, max_new_tokens=7, eos_token_id=None, **settings)
        torch.manual_seed(3)
        found = model.generate(ids, attention_mask=mask, max_new_tokens=7, eos_token_id=None, **settings)
        assert torch.equal(found, right)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        num_beams=2,
    )
    assert list(output)[:3] == ["sequences", "sequences_scores", "scores"] and output.attentions is None
    config = hf.GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert model.generate(ids, generation_config=config).shape == (2, 26)
    longer = model.generate(ids, config, max_new_tokens=5)
    assert longer.shape == (2, 28) and config.num_beams == 1 and config.to_diff_dict()["max_new_tokens"] == 3


@torch.no_grad()
def test_padding_is_seen_without_a_mask(family, tmp_path):
    model, (ids, mask) = documented(family, tmp_path), inputs(90, padded=True)
    ids = ids.masked_fill(mask == 0, 99)
    right = model.generate(ids, attention_mask=mask, max_new_tokens=5, pad_token_id=99, eos_token_id=98)
    assert torch.equal(model.generate(ids, max_new_tokens=5, pad_token_id=99, eos_token_id=98), right)


def test_no_room_is_one_token_and_a_warning(tmp_path):
    model = documented(PHI, tmp_path)
    with pytest.warns(UserWarning, match="max_length 5 leaves no room"):
        assert model.generate(torch.ones(1, 9, dtype=torch.long), max_length=5).shape == (1, 10)
    for wrong in ({"max_new_token": 3}, {"num_beam": 2}):
        with pytest.raises(TypeError, match="did you mean"):
            model.generate(torch.ones(1, 9, dtype=torch.long), **wrong)


@torch.no_grad()
def test_generating_from_a_cache(family, tmp_path):
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    past = model(ids[:, :-1], use_cache=True).past_key_values
    found = [model.generate(ids, past_key_values=past, max_new_tokens=6, eos_token_id=None) for _ in range(2)]
    assert torch.equal(*found) and torch.equal(
        found[0], model.generate(ids, max_new_tokens=6, eos_token_id=None)
    )
    given = model.prepare_inputs_for_generation(
        ids, past_key_values=past, attention_mask=torch.ones_like(ids)
    )
    assert given["input_ids"].shape == (2, 1)
    torch.testing.assert_close(model(**given).logits[:, -1], model(ids).logits[:, -1], **CLOSE)


@torch.no_grad()
def test_a_subclass_with_another_pass_generates_by_it(tmp_path):
    class Biased(hf.PhiForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.index_add(
                -1, torch.tensor([7]), torch.full((*output.logits.shape[:2], 1), 1e4)
            )
            return output

    model = Biased.from_pretrained(folder_of(PHI, tmp_path))
    assert model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4)[0, 3:].tolist() == [7] * 4
    assert (
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, num_beams=2)[0, 3:].tolist()
        == [7] * 4
    )


def test_transformers_own_settings_count(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(max_new_tokens=3, min_new_tokens=3, num_beams=2)
    assert documented(PHI, tmp_path).generate(torch.ones(1, 3, dtype=torch.long), config).shape == (1, 6)


# ---- Configs


def test_a_config_keeps_what_it_does_not_know(family, tmp_path):
    config_class = getattr(hf, family.class_name("Config").replace("LMHeadModelConfig", "Config"))
    sizes = {key: value for key, value in family.tiny.items() if key != "model_type"}
    config = config_class(**sizes, id2label={0: "no", 1: "so so", 2: "yes"}, note={"a": 1})
    assert (
        config.num_labels == 3
        and config.label2id == {"no": 0, "so so": 1, "yes": 2}
        and config.note == {"a": 1}
    )
    config.save_pretrained(tmp_path)
    again = config_class.from_pretrained(tmp_path)
    assert again.id2label == config.id2label and again.note == {"a": 1}
    assert again.to_dict() == config.to_dict()
    named = hf.AutoConfig.from_pretrained(tmp_path)
    assert named.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
    assert json.loads(config.to_json_string())["note"] == {"a": 1}
    again.num_labels = 5
    assert again.id2label[4] == "LABEL_4" and len(again.label2id) == 5
    assert config_class.from_pretrained(tmp_path, num_labels=4).num_labels == 4
    with pytest.raises(TypeError, match="did you mean"):
        config_class.from_pretrained(tmp_path, num_label=4)
    config, unused = config_class.from_pretrained(tmp_path, num_label=4, return_unused_kwargs=True)
    assert unused == {"num_label": 4}
    assert type(hf.AutoConfig.from_pretrained(tmp_path)) is config_class
    with pytest.raises(ValueError, match="hidden_act|afn|activation_function"):
        config_class(
            **{
                **sizes,
                {"gpt_neo": "activation_function", "openai-gpt": "afn"}.get(
                    family.name, "hidden_act"
                ): "none",
            }
        )


def test_names_of_other_models(tmp_path):
    config = hf.OpenAIGPTConfig(n_embd=48, n_head=4)
    assert config.hidden_size == 48 and config.num_attention_heads == 4
    config.hidden_size = 96
    assert config.n_embd == 96
    assert hf.GPTNeoConfig(num_layers=2, attention_types=[[["global"], 2]]).num_hidden_layers == 2
    assert hf.FuyuConfig(hidden_size=64, num_attention_heads=4).text_config.hidden_size == 64
    assert hf.FuyuConfig(text_config={"hidden_size": 64, "num_attention_heads": 4}).hidden_act == "relu2"
    assert hf.PhiConfig(512, 64, 96, 2, 4).intermediate_size == 96
    hf.PhiConfig().save_pretrained(tmp_path)  # all fields are there, the defaults too
    assert hf.PhiConfig.from_pretrained(tmp_path).hidden_size == 2048
    config = hf.PhiConfig(101, 48, 80, 2, 4, torch_dtype="float16")
    assert hf.AutoModelForCausalLM.from_config(config).dtype == torch.float16
    assert hf.PhiModel(config).dtype == torch.float32 and hf.PhiModel(config)._no_split_modules == [
        "PhiBlock"
    ]


# ---- From a folder, and back


@pytest.mark.parametrize(
    "asked, found",
    [
        ({}, torch.float32),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "float64"}, torch.float64),
        ({"torch_dtype": torch.float16, "dtype": "float16"}, torch.float16),
    ],
)
def test_float32_unless_asked(tmp_path, asked, found):
    folder = folder_of(PHI, tmp_path, dtype=torch.bfloat16)
    model = hf.PhiForCausalLM.from_pretrained(folder, **asked)
    assert (
        model.dtype == found == model.config.torch_dtype and model.device.type == "cpu" and not model.training
    )


def test_what_cannot_be_loaded_is_told(tmp_path):
    folder = folder_of(PHI, tmp_path)
    for options, shown in (
        ({"torch_dtype": "float16", "dtype": "float32"}, "are the same argument"),
        ({"torch_dtype": "float15"}, "must be a torch.dtype"),
        ({"attn_implementation": "flash"}, "'sdpa', 'eager' or 'flash_attention_2'"),
        ({"attn_implementation": "flash_attention_2"}, "NVIDIA GPU"),
    ):
        if "flash_attention_2" in str(options) and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=shown):
            hf.PhiForCausalLM.from_pretrained(folder, **options)
    with pytest.raises(ValueError, match="'phi' is not phi3"):
        hf.Phi3ForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="Phi has no such head, only .*PhiForTokenClassification"):
        hf.AutoModelForQuestionAnswering.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="there is no folder nobody/nothing"):
        hf.PhiForCausalLM.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(TypeError, match="'state_dict'"):  # not silently the file's weights instead
        hf.PhiForCausalLM.from_pretrained(folder, state_dict={})
    with pytest.raises(TypeError, match="'num_hidden_layer': did you mean 'num_hidden_layers'"):
        hf.PhiForCausalLM.from_pretrained(folder, num_hidden_layer=2)


def test_what_has_no_effect_is_said_once(tmp_path):
    folder = folder_of(PHI, tmp_path)
    already_said.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            hf.PhiForCausalLM.from_pretrained(
                folder, trust_remote_code=True, low_cpu_mem_usage=True
            ).generate(torch.ones(1, 2, dtype=torch.long), synced_gpus=True, max_new_tokens=1)
    found = [str(one.message).split(" ")[0] for one in said]
    assert sorted(found) == ["low_cpu_mem_usage", "synced_gpus", "trust_remote_code"]


def test_loading_tells_what_was_missing(tmp_path):
    folder = folder_of(PHI, tmp_path)
    with pytest.warns(UserWarning, match="score.weight: drawn anew"):
        model, shown = hf.PhiForSequenceClassification.from_pretrained(
            folder, num_labels=3, output_loading_info=True
        )
    assert shown["missing_keys"] == {"score.weight"} and sorted(shown["unexpected_keys"]) == [
        "lm_head.bias",
        "lm_head.weight",
    ]
    assert model.config.num_labels == 3 and model.score.weight.shape == (3, 48)
    config = hf.PhiConfig.from_pretrained(folder, attention_dropout=0.25)
    model = hf.PhiModel.from_pretrained(folder, config=config, resid_pdrop=0.5)
    assert model.config.attention_dropout == 0.25 and model.layers[0].resid_dropout.p == 0.5


def test_a_head_of_other_size_is_drawn_anew_if_asked(tmp_path):
    folder = folder_of(PHI, tmp_path, "ForSequenceClassification", num_labels=2)
    with pytest.raises(ValueError, match=r"score.weight is \(2, 48\)"):
        hf.PhiForSequenceClassification.from_pretrained(folder, num_labels=5)
    with pytest.warns(UserWarning, match="score.weight have 5 labels, the checkpoint's 2: drawn anew"):
        model, shown = hf.PhiForSequenceClassification.from_pretrained(
            folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert (
        model.score.weight.shape == (5, 48)
        and model.score.weight.std() > 0
        and len(model.config.id2label) == 5
    )
    assert shown["mismatched_keys"] == {"score.weight"} and model(
        torch.ones(1, 3, dtype=torch.long)
    ).logits.shape == (1, 5)


def test_a_hub_id_resolves_in_the_cache(tmp_path):
    pytest.importorskip("huggingface_hub")
    home = hub_cache.build(tmp_path)
    options = {"cache_dir": str(home / "hub"), "local_files_only": True, "revision": "main", "token": None}
    model = hf.AutoModelForCausalLM.from_pretrained("adept/persimmon-8b-base", device_map="auto", **options)
    tokenizer = hf.AutoTokenizer.from_pretrained("adept/persimmon-8b-base", **options)
    assert (
        model.name_or_path == "adept/persimmon-8b-base"
        and model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=2).shape[1] > 3
    )
    hf.FuyuProcessor.from_pretrained("adept/fuyu-8b", **options)
    inside = hf.AutoModelForCausalLM.from_pretrained(home / "folders", subfolder="tiny-phi")
    assert type(inside) is hf.PhiForCausalLM


@torch.no_grad()
def test_every_family_and_head_comes_back(family, tmp_path):
    ids = inputs(101)[0][:1]
    for head in ("ForCausalLM", *family.heads):
        model = documented(family, tmp_path, head)
        model.config.note = "kept"
        model.save_pretrained(tmp_path / head, max_shard_size="40KB")
        assert (tmp_path / head / "model.safetensors.index.json").exists()
        again = type(model).from_pretrained(tmp_path / head)
        assert torch.equal(again(ids)[0], model(ids)[0]) and again.config.note == "kept"
        state = {name: value + 1 for name, value in model.state_dict().items()}
        model.save_pretrained(tmp_path / "other", state_dict=state)
        other = type(model).from_pretrained(tmp_path / "other")
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
        other = type(model)._from_config(model.config, torch_dtype=torch.bfloat16)
        assert other.dtype == torch.bfloat16
        plain = model.plain
        assert type(plain) is family.cls(head) and next(plain.parameters()) is next(model.parameters())
        if head.endswith("Classification"):
            assert isinstance(getattr(hf, f"AutoModel{head}").from_pretrained(tmp_path / head), type(model))


def test_transformers_reads_what_is_saved(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    model.save_pretrained(tmp_path / "saved")
    theirs = getattr(transformers, type(model).__name__).from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, **CLOSE)


# ---- Parts


@torch.no_grad()
def test_embeddings(family, tmp_path):
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.weight.shape == (101, 48) and head.weight.shape == (101, 48)
    assert (head.weight is table.weight) == model.config.tie_word_embeddings
    assert torch.equal(model(inputs_embeds=table(ids)).logits, model(ids).logits)
    before = model(ids).logits
    assert model.resize_token_embeddings(103, pad_to_multiple_of=8).weight.shape == (104, 48)
    torch.testing.assert_close(model(ids).logits[..., :101], before, **CLOSE)
    assert model.config.vocab_size == 104 and model.get_output_embeddings().out_features == 104
    model.set_input_embeddings(nn.Embedding(104, 48))
    assert not torch.equal(model(ids).logits[..., :101], before)
    assert (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ) == model.config.tie_word_embeddings
    counted = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == counted and model.num_parameters(exclude_embeddings=True) < counted
    assert model.base_model is getattr(model, model.base_model_prefix) and model.can_generate()


@torch.no_grad()
@pytest.mark.parametrize("masked", [GPT_NEO, OPENAI_GPT], ids=str)
def test_pruned_heads_are_masked_heads(masked, tmp_path):
    family = masked
    model, (ids, mask) = documented(family, tmp_path), inputs(101, padded=True)
    heads = torch.ones(3, 4)
    heads[0, [1, 3]] = heads[2, 0] = 0
    right, longer = model(ids, attention_mask=mask, head_mask=heads).logits, torch.cat([ids, ids], 1)
    also = heads.clone()
    also[0, 0] = 0
    more = model(ids, attention_mask=mask, head_mask=also).logits
    n = model.num_parameters()
    model.prune_heads({0: [1, 3], 2: [0]})
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, right, **CLOSE)
    assert model.num_parameters() < n and longer.shape[1] == 46
    assert model.generate(ids, max_new_tokens=4, eos_token_id=None).shape == (2, 27)
    model.prune_heads({0: [0]})  # numbered as before
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, more, **CLOSE)
    model.save_pretrained(tmp_path / "pruned")
    again = type(model).from_pretrained(tmp_path / "pruned")
    assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    with pytest.raises(ValueError, match="cannot be pruned"):
        model.prune_heads({1: [0, 1, 2, 3]})


def test_heads_of_others_cannot_be_pruned(tmp_path):
    with pytest.raises(NotImplementedError, match="PhiForCausalLM cannot be pruned"):
        documented(PHI, tmp_path).prune_heads({0: [1]})


@torch.no_grad()
def test_eager_is_the_formula(family, tmp_path):
    model, (ids, mask) = documented(family, tmp_path), inputs(101, padded=True)
    right = model(ids, attention_mask=mask).logits
    seen = []
    eager = type(model).from_pretrained(tmp_path / "checkpoint", attn_implementation="eager")
    for part in hf.attentions_of(eager):
        part.attend = (lambda attend: lambda *a, **k: seen.append(attend(*a, **k)) or seen[-1])(part.attend)
    torch.testing.assert_close(eager(ids, attention_mask=mask).logits, right, **CLOSE)
    assert len(seen) == 3 and eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids).logits, model(ids).logits, **CLOSE)
    assert torch.equal(eager.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))


def test_training_by_the_documented_class(family, tmp_path):
    rates = without_dropout(family)
    model = getattr(hf, family.class_name()).from_pretrained(folder_of(family, tmp_path, **rates)).train()
    plain, (ids, _) = family.model(**rates).train(), inputs(101)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for one in (model, plain):
        one(ids, labels=ids)[0].backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=2e-5, rtol=1e-4, msg=name)


# ---- Other frameworks' files


def test_the_two_lines_read_flax(tmp_path):
    with pytest.raises(ImportError, match="two lines") as shown:
        from decoders.hf import FlaxGPTNeoForCausalLM  # noqa: F401
    folder = folders.write_config(tmp_path, GPT_NEO)
    folders.flax(folder, folders.weights_of(GPT_NEO))
    run_lines(str(shown.value), folder, GPT_NEO.model())


def test_the_two_lines_read_tensorflow(tmp_path):
    pytest.importorskip("h5py")
    with pytest.raises(ImportError, match="two lines") as shown:
        from decoders.hf import TFOpenAIGPTLMHeadModel  # noqa: F401
    folder = folders.write_config(tmp_path, OPENAI_GPT)
    folders.tensorflow(folder, folders.weights_of(OPENAI_GPT))
    run_lines(str(shown.value), folder, OPENAI_GPT.model())


def run_lines(shown: str, folder, right) -> None:
    code = "\n".join(line.strip() for line in shown.split("\n")[1:]).replace("FOLDER", repr(str(folder)))
    world = {}
    exec(code, world)
    ids, _ = inputs(101)
    with torch.no_grad():
        torch.testing.assert_close(world["model"](ids).logits, right(ids).logits, **CLOSE)


def test_unknown_names_have_a_nearest_one():
    with pytest.raises(ImportError):
        from decoders.hf import PhiForCausalLm  # noqa: F401
    with pytest.raises(AttributeError, match="did you mean 'PhiForCausalLM'"):
        hf.PhiForCausalLm  # noqa: B018


def test_importing_needs_the_core_alone():
    """And takes about as long as importing torch does."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'numpy', 'huggingface_hub', 'PIL', 'jinja2')))\n"
        "import decoders.hf as hf; print(hf.PhiForCausalLM.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "PhiForCausalLM", done.stderr


# ---- Tokens, texts, streams, pipelines


@pytest.fixture(scope="module")
def phi():
    folder = CHECKPOINTS / "tiny-phi"
    return hf.AutoModelForCausalLM.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)


def test_streamers(phi, capsys):
    model, tokenizer = phi
    given = tokenizer("Once upon a time", return_tensors="pt")
    text = tokenizer.decode(model.generate(**given, max_new_tokens=20)[0])
    model.generate(**given, max_new_tokens=20, streamer=hf.TextStreamer(tokenizer))
    assert capsys.readouterr().out == text + "\n"
    streamer = hf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(
        target=model.generate, kwargs={**given, "max_new_tokens": 20, "streamer": streamer}
    )
    thread.start()
    assert "Once upon a time" + "".join(streamer) == text
    thread.join()


def test_processors_and_criteria_by_name(phi):
    model, tokenizer = phi
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    chosen = hf.LogitsProcessorList(
        [hf.RepetitionPenaltyLogitsProcessor(penalty=1.5), hf.NoRepeatNGramLogitsProcessor(2)]
    )
    right = model.generate(ids, max_new_tokens=15, repetition_penalty=1.5, no_repeat_ngram_size=2)
    assert torch.equal(model.generate(ids, max_new_tokens=15, logits_processor=chosen), right)
    ends = hf.StoppingCriteriaList([hf.MaxLengthCriteria(max_length=ids.shape[1] + 3)])
    assert model.generate(ids, max_new_tokens=15, stopping_criteria=ends).shape[1] == ids.shape[1] + 3

    class Only(hf.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    assert model.generate(ids, max_new_tokens=3, logits_processor=[Only()])[0, -3:].tolist() == [7, 7, 7]


def test_a_token_is_added_and_saved(tmp_path):
    tokenizer = hf.OpenAIGPTTokenizer.from_pretrained(CHECKPOINTS / "tiny-openai-gpt")
    n = len(tokenizer)
    assert (
        tokenizer.add_special_tokens({"cls_token": "[CLS]"}) == 1
        and tokenizer.cls_token_id == n
        and len(tokenizer) == n + 1
    )
    assert tokenizer.encode("hello [CLS]")[-1] == n and tokenizer.decode([n], skip_special_tokens=True) == ""
    tokenizer.pad_token = "[CLS]"
    assert tokenizer.pad_token_id == n and tokenizer.all_special_ids[-1] == n
    tokenizer.save_pretrained(tmp_path)
    again = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        type(again) is hf.OpenAIGPTTokenizerFast
        and again.cls_token == again.pad_token == "[CLS]"
        and again.encode("[CLS]") == [n]
    )
    paths = tokenizer.save_vocabulary(tmp_path, "mine")
    files = hf.OpenAIGPTTokenizer(*paths)
    assert files.encode("hello there") == tokenizer.encode("hello there") and files.unk_token == "<unk>"
    assert (
        tokenizer.decode(tokenizer.encode("Hello, my dog is cute!")) == "hello, my dog is cute!"
    )  # cleaned up
    with pytest.raises(TypeError, match="'cls_tokens': did you mean 'cls_token'"):
        tokenizer.add_special_tokens({"cls_tokens": "x"})


def test_tokenizers_tell_what_is_wrong(phi):
    _, tokenizer = phi
    for call, shown in (
        (lambda: tokenizer(["a", "a b c d"], return_tensors="pt"), "different lengths: give padding=True"),
        (lambda: tokenizer(["a", "b"], padding=True), "padding needs a pad_token"),
        (lambda: tokenizer("a", return_tensors="tf"), "TensorFlow and JAX take 'np'"),
        (lambda: tokenizer(3.5), "must be a text"),
        (lambda: tokenizer("a", truncation="yes"), "truncation must be"),
        (lambda: tokenizer(["a", "b"], is_split_into_words=True), "add_prefix_space=True"),
        (
            lambda: hf.LlamaTokenizer.from_pretrained(CHECKPOINTS / "tiny-phi"),
            "holds no LlamaTokenizer: use GPT2Tokenizer",
        ),
    ):
        with pytest.raises(ValueError, match=shown):
            call()
    with pytest.raises(TypeError, match="'paddings': did you mean 'padding'"):
        tokenizer("a", paddings=True)


def test_a_batch_goes_to_a_device(phi):
    _, tokenizer = phi
    batch = tokenizer("Once upon", return_tensors="pt")
    assert batch.to("meta").input_ids.device.type == "meta" and isinstance(batch, dict)
    assert tokenizer("Once upon", return_tensors="np")["input_ids"].dtype.name == "int64"
    tokens = tokenizer.tokenize("Once upon a time")
    assert tokenizer.convert_tokens_to_ids(tokens) == tokenizer("Once upon a time").input_ids and any(
        "Ġ" in token for token in tokens
    )
    assert tokenizer.convert_tokens_to_string(tokens) == "Once upon a time"
    assert {tokenizer.get_vocab()[token] for token in tokens} <= set(range(len(tokenizer)))


def test_chat_templates(tmp_path):
    tokenizer = hf.AutoTokenizer.from_pretrained(CHECKPOINTS / "tiny-phi3")
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Who?"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == tokenizer.plain.chat(messages)
    whole = tokenizer.apply_chat_template(
        [messages[:1], messages], add_generation_prompt=True, tokenize=False
    )
    assert len(whole) == 2 and whole[1].startswith(whole[0][:10])
    going_on = tokenizer.apply_chat_template(messages[:2], continue_final_message=True, tokenize=False)
    assert going_on.endswith("Hi")
    custom = tokenizer.apply_chat_template(
        messages, chat_template="{{ messages|length }}{{ bos_token }}", tokenize=False
    )
    assert custom == "3<s>"
    with pytest.raises(ValueError, match="refused the conversation: no"):
        tokenizer.apply_chat_template(messages, chat_template="{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="refused|template"):
        tokenizer.apply_chat_template(
            messages, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}", tokenize=False
        )


def test_pipelines(phi, tmp_path):
    model, tokenizer = phi
    write = hf.pipeline("text-generation", model=CHECKPOINTS / "tiny-phi")
    [found] = write("Once upon a time", max_new_tokens=8)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert found["generated_text"] == tokenizer.decode(
        model.generate(ids, max_new_tokens=8)[0], skip_special_tokens=True
    )
    assert [
        len(row) for row in write(["Once", "There"], max_new_tokens=3, do_sample=True, num_return_sequences=2)
    ] == [2, 2]
    [answer] = hf.pipeline("text-generation", model=CHECKPOINTS / "tiny-phi3")(
        [{"role": "user", "content": "Tell me a story."}], max_new_tokens=5
    )
    assert answer["generated_text"][-1]["role"] == "assistant"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        classify = hf.pipeline("text-classification", model=CHECKPOINTS / "tiny-phi")
        label = hf.pipeline(
            "token-classification", model=CHECKPOINTS / "tiny-phi", aggregation_strategy="simple"
        )
        ask = hf.pipeline("question-answering", model=CHECKPOINTS / "tiny-gpt-neo")
    [best] = classify("A fox.")
    assert best["label"] in ("LABEL_0", "LABEL_1") and 0.5 <= best["score"] <= 1
    assert sum(one["score"] for one in classify("A fox.", top_k=None)) == pytest.approx(1)
    text = "Nora met a fox in the woods."
    assert all(text[group["start"] : group["end"]].strip() == group["word"].strip() for group in label(text))
    context = "Nora met a fox. " * 60
    answer = ask(question="Who was it?", context=context, max_seq_len=64, doc_stride=16)
    assert context[answer["start"] : answer["end"]].strip() == answer["answer"] and 0 <= answer["score"] <= 1
    with pytest.raises(ValueError, match="'text-generatio': did you mean 'text-generation'"):
        hf.pipeline("text-generatio")


# ---- Fuyu


def test_fuyu_answers_about_a_picture():
    """The documented example that was lost in translation."""
    image = pytest.importorskip("PIL.Image").open(CHECKPOINTS / "tiny-fuyu" / "shapes.png")
    processor = hf.FuyuProcessor.from_pretrained(CHECKPOINTS / "tiny-fuyu")
    model = hf.FuyuForCausalLM.from_pretrained(CHECKPOINTS / "tiny-fuyu")
    given = processor(text="Generate a coco-style caption.\n", images=image, return_tensors="pt")
    assert list(given) == ["input_ids", "attention_mask", "image_patches", "image_patches_indices"]
    assert model(**given).logits.shape == (1, given.input_ids.shape[1], model.config.vocab_size)
    [text] = processor.batch_decode(
        model.generate(**given, max_new_tokens=12)[:, -12:], skip_special_tokens=True
    )
    assert "circle" in text or "square" in text or "triangle" in text, text
    with pytest.raises(ValueError, match="return_attention_mask=False"):
        processor("x", return_attention_mask=False)
    assert (
        "input_ids" in processor("only text")
        and type(hf.AutoProcessor.from_pretrained(CHECKPOINTS / "tiny-fuyu")) is hf.FuyuProcessor
    )


@pytest.mark.parametrize("size", GOLDEN["pictures"])
def test_pictures_are_bit_for_bit_those_of_4_37(size):
    height, width = map(int, size.split("x"))
    processor = hf.FuyuProcessor.from_pretrained(CHECKPOINTS / "tiny-fuyu")
    found = processor("", picture(height, width))
    [patches] = found["image_patches"]
    assert golden_fuyu.digest(patches[0]) == GOLDEN["pictures"][size]["sha256"]
    [[image]] = hf.FuyuImageProcessor()(picture(height, width)).images
    assert image.shape == (3, 1080, 1920)  # as documented


@pytest.mark.parametrize(
    "changes",
    [
        {"do_resize": False},
        {"do_pad": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": 0.3, "image_std": 0.7},
        {"size": {"height": 60, "width": 90}},
        {"padding_value": 7.0},
        {"rescale_factor": 0.01},
        {"resample": 0},
    ],
)
def test_each_step_of_a_picture_can_change(changes, tmp_path):
    """As defined: scale down, pad, times the factor, minus the mean, by the deviation."""
    numpy = pytest.importorskip("numpy")
    pixels = numpy.random.default_rng(0).integers(0, 255, (75, 100, 3), dtype=numpy.uint8)
    small = {"size": {"height": 60, "width": 90}}
    processor = hf.FuyuImageProcessor(**{**small, **changes})
    found = processor(pixels)
    image, height, width = (
        found.images[0][0],
        found.image_unpadded_heights[0][0],
        found.image_unpadded_widths[0][0],
    )
    s = processor.to_dict()
    if s["do_resize"]:
        assert (height, width) == (60, 80)
    else:
        assert (height, width) == (75, 100)
    assert tuple(image.shape[1:]) == ((max(60, height), max(90, width)) if s["do_pad"] else (height, width))
    inner = image[:, :height, :width]
    plain = hf.FuyuImageProcessor(
        **{
            **small,
            "do_rescale": False,
            "do_normalize": False,
            **{k: v for k, v in changes.items() if k in ("resample", "do_resize")},
        }
    )(pixels)
    values = plain.images[0][0][:, :height, :width].double()
    values = values * s["rescale_factor"] if s["do_rescale"] else values
    values = (values - s["image_mean"]) / s["image_std"] if s["do_normalize"] else values
    torch.testing.assert_close(inner.double(), values, atol=1e-5, rtol=1e-5)
    processor.save_pretrained(tmp_path)
    again = hf.FuyuImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict() and torch.equal(again(pixels).images[0][0], image)
    with pytest.raises(ValueError, match="size must be height and width in pixels"):
        hf.FuyuImageProcessor(size={"height": 60})
