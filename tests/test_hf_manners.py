"""What people stack on top of the documented classes: parts of them, heads of their own, copies, loading."""

import copy
import inspect
import io
import multiprocessing
import pickle
import warnings

import pytest
import torch
from torch import nn

from decoders import hf, weights
from tests.conftest import ROOT
from tests.families import PHI, PHI3, inputs

CLOSE = {"atol": 2e-5, "rtol": 0}


def documented(family, path, head: str = "ForCausalLM", **options):
    weights.save(family.model(head), path)
    return getattr(hf, family.class_name(head)).from_pretrained(path, **options)


# ---- Parts -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_parts_are_documented_models_themselves(family, tmp_path):
    """Of `m.model` the pass knew no return_dict, and there was no save_pretrained."""
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    part = model.get_decoder()
    assert part.get_input_embeddings() is model.get_input_embeddings() and part.dtype == torch.float32
    output = part(ids, return_dict=True, output_hidden_states=True)
    assert isinstance(output, hf.ModelOutput) and isinstance(part(ids, return_dict=False), tuple)
    head = model.get_output_embeddings()
    torch.testing.assert_close(head(output.last_hidden_state), model(ids).logits, **CLOSE)
    part.save_pretrained(tmp_path / "part")
    if type(part).__name__.startswith("FuyuText"):
        return
    again = type(part).from_pretrained(tmp_path / "part")
    assert torch.equal(again(ids)[0], part(ids)[0]) and model.base_model is part


@torch.no_grad()
def test_threads_see_parts_and_wholes_at_once(tmp_path):
    """That a part runs within a whole is known to its own thread alone."""
    from concurrent.futures import ThreadPoolExecutor

    model, (ids, _) = documented(PHI, tmp_path), inputs(101)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: (model if i % 2 else model.model)(ids), range(60)))
    assert all(isinstance(output, hf.ModelOutput) for output in found)


# ---- Own classes on top ------------------------------------------------------------------------------------


class WithOneLayerMore(hf.PhiForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.more, self.scale = nn.Linear(config.hidden_size, 3), nn.Parameter(torch.zeros(2))


class Head(hf.PhiPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model, self.own = hf.PhiModel(config), nn.Linear(config.hidden_size, 5)
        self.post_init()

    def forward(self, input_ids, labels=None):
        return self.own(self.model(input_ids, return_dict=True).last_hidden_state)


@torch.no_grad()
def test_a_subclass_with_a_layer_more_saves_and_loads(tmp_path):
    documented(PHI, tmp_path / "base")
    with pytest.warns(UserWarning, match="scale, more.weight, more.bias: drawn anew|more"):
        model = WithOneLayerMore.from_pretrained(tmp_path / "base")
    assert (
        model.more.weight.std() > 0 and model.more.bias.eq(0).all() and model.more.weight.device.type == "cpu"
    )
    model.more.weight.fill_(0.25)
    model.save_pretrained(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = WithOneLayerMore.from_pretrained(tmp_path / "own")
    assert again.more.weight.eq(0.25).all() and torch.equal(again.scale, model.scale)


@torch.no_grad()
def test_a_head_of_ones_own(tmp_path):
    ids, _ = inputs(101)
    documented(PHI, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Head.from_pretrained(tmp_path / "base")
    assert model(ids).shape == (2, 23, 5) and isinstance(model, hf.PreTrainedModel)
    base = hf.PhiModel.from_pretrained(tmp_path / "base")
    assert torch.equal(model.model(ids).last_hidden_state, base(ids).last_hidden_state)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(Head.from_pretrained(tmp_path / "own")(ids), model(ids))


# ---- Copies ------------------------------------------------------------------------------------------------


def answer(model, ids, queue):
    queue.put(model(ids).logits.sum().item())


@torch.no_grad()
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside transformers"])
def test_models_are_pickled_and_saved_whole(family, tmp_path, beside):
    """To `isinstance` they are Transformers' too, and pickle asks for the class."""
    if beside:
        pytest.importorskip("transformers")
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
    ):
        torch.testing.assert_close(again(ids).logits, model(ids).logits, **CLOSE)
        assert type(again) is type(model)
        assert type(again.get_decoder()) is type(model.get_decoder())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    if family is PHI:
        process = context.Process(target=answer, args=(model, ids, queue))
        process.start()
        assert queue.get(timeout=120) == pytest.approx(model(ids).logits.sum().item(), rel=1e-4)
        process.join()


# ---- Loading -----------------------------------------------------------------------------------------------


def test_tensors_of_another_size_are_drawn_anew_if_asked(tmp_path):
    documented(PHI, tmp_path)
    changes = {"vocab_size": 120}
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=r"lm_head.weight is \(101, 48\).*ignore_mismatched_sizes=True"):
            hf.PhiForCausalLM.from_pretrained(tmp_path, **changes)
    with pytest.warns(UserWarning, match="of another size: drawn anew"):
        model, info = hf.PhiForCausalLM.from_pretrained(
            tmp_path, **changes, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert model(torch.full((1, 3), 119)).logits.shape == (1, 3, 120)
    assert {"lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"} == {*info["mismatched_keys"]}
    assert torch.equal(model.model.layers[0].mlp.fc1.weight, PHI.model().model.layers[0].mlp.fc1.weight)


@torch.no_grad()
def test_a_missing_tensor_is_drawn_anew_with_a_warning(tmp_path):
    """`weights.load` refuses."""
    from safetensors.torch import load_file, save_file

    documented(PHI3, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.down_proj.weight"]
    save_file({**state, "model.extra": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing: model.layers.1.mlp.down_proj.weight"):
        weights.load(PHI3.cls("ForCausalLM"), tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, info = hf.Phi3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    text = " ".join(str(one.message) for one in said)
    assert "model.layers.1.mlp.down_proj.weight: drawn anew" in text and "model.extra" in text
    assert info["missing_keys"] == {"model.layers.1.mlp.down_proj.weight"}
    assert info["unexpected_keys"] == {"model.extra"}
    assert model.model.layers[1].mlp.down_proj.weight.std() > 0


@torch.no_grad()
def test_a_state_dict_in_place_of_a_folder(family, tmp_path):
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    again = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **CLOSE)
    assert not again.training
    with pytest.warns(UserWarning, match="state_dict does not fit"):
        type(model).from_pretrained(None, config=model.config, state_dict={"x": torch.zeros(1)})


# ---- Configs -----------------------------------------------------------------------------------------------


def test_what_scripts_ask_of_a_config(family, tmp_path):
    model = documented(family, tmp_path, attn_implementation="eager")
    config = model.config
    assert not config.is_encoder_decoder and config.get_text_config().vocab_size == 101
    assert config._attn_implementation == config.attn_implementation == "eager"
    assert "attn_implementation" not in config.to_dict()
    config.to_json_file(tmp_path / "other.json")
    assert type(config).from_json_file(tmp_path / "other.json").to_dict() == config.to_dict()
    stored, rest = type(config).get_config_dict(tmp_path, foo=1)
    assert stored["model_type"] == config.model_type and rest == {"foo": 1}
    _, unused = type(config).from_dict(stored, return_unused_kwargs=True, foo=1, use_cache=False)
    assert unused == {"foo": 1}
    parameters = inspect.signature(type(config).__init__).parameters
    assert {"self", "vocab_size"} <= {*parameters} and "initializer_range" in parameters


def test_a_config_of_ones_own_is_registered(tmp_path):
    class OwnConfig(hf.PhiConfig):
        model_type = "own-phi"

    class OwnModel(hf.PhiForCausalLM):
        config_class = OwnConfig

    hf.AutoConfig.register("own-phi", OwnConfig)
    hf.AutoModelForCausalLM.register(OwnConfig, OwnModel)
    tiny = {key: value for key, value in PHI.tiny.items() if key != "model_type"}
    OwnConfig(**tiny).save_pretrained(tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is OwnConfig and type(hf.AutoModelForCausalLM.from_config(config)) is OwnModel
    assert isinstance(hf.AutoConfig.for_model("own-phi", **tiny), OwnConfig)


# ---- Losses ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_num_items_in_batch_divides_the_sum(family, tmp_path):
    """Trainer counts the labels of several batches, and each loss is its share."""
    model, (ids, _) = documented(family, tmp_path), inputs(101)
    labels = ids.clone()
    labels[0, :9] = -100
    mean, n = model(ids, labels=labels).loss, int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=n).loss, mean)
    torch.testing.assert_close(
        model(ids, labels=labels, num_items_in_batch=torch.tensor(2 * n)).loss, mean / 2
    )


@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
def test_the_loss_and_the_attention_have_their_names_at_transformers(family, tmp_path, head):
    """Trainer asks whether the loss shifts labels, and counted one too many in each sequence; trl loads its reference
    model with our attention, which was called sdpa where Transformers refuses it."""
    transformers = pytest.importorskip("transformers")
    ours = documented(family, tmp_path, head)
    theirs = getattr(transformers, family.class_name(head)).from_pretrained(tmp_path)
    assert ours.loss_type == theirs.loss_type
    assert ours.config._attn_implementation == theirs.config._attn_implementation


# ---- Hints -------------------------------------------------------------------------------------------------


def test_hints_never_lead_astray(tmp_path):
    """`token_type_ids` of Phi was answered with pad_token_id."""
    model, (ids, _) = documented(PHI, tmp_path), inputs(101)
    for name, hint in (
        ("attention_maks", "attention_mask"),
        ("mask", "attention_mask"),
        ("ids", "input_ids"),
    ):
        with pytest.raises(TypeError, match=f"{name!r}: did you mean {hint!r}"):
            model(ids, **{name: None})
    for name in ("token_type_ids", "head_mask", "images"):
        with pytest.raises(TypeError, match=f"keyword argument {name!r}$"):
            model(ids, **{name: None})
    with pytest.raises(AttributeError, match="has no 'FluxPipeline'$"):
        hf.FluxPipeline  # noqa: B018
    tokenizer = hf.AutoTokenizer.from_pretrained("checkpoints/tiny-phi")
    with pytest.raises(
        AttributeError, match="has no 'push_to_hub'$"
    ):  # it has, for isinstance, Transformers' class
        tokenizer.push_to_hub  # noqa: B018


def test_what_wraps_a_model_is_named(tmp_path):
    """Instead of all names as missing and as unexpected."""
    from safetensors.torch import load_file, save_file

    documented(PHI, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for prefix, whose in (("_orig_mod.", "torch.compile"), ("module.", "DataParallel")):
        names = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        save_file(names, tmp_path / "model.safetensors", {"format": "pt"})
        for load in (
            hf.PhiForCausalLM.from_pretrained,
            lambda path: weights.load(PHI.cls("ForCausalLM"), path),
        ):
            with pytest.raises(ValueError, match=f"the names are those of {whose}"):
                load(tmp_path)


def test_a_dtype_by_name_and_labels_that_are_none(tmp_path):
    model, (ids, _) = documented(PHI, tmp_path), inputs(101)
    assert (
        weights.load(PHI.cls("ForCausalLM"), tmp_path, dtype="bfloat16").lm_head.weight.dtype
        == torch.bfloat16
    )
    for wrong in ("bfloat17", "int8", 16):
        with pytest.raises(ValueError, match="dtype must be float32, float64, bfloat16 or float16 of torch"):
            weights.load(PHI.cls("ForCausalLM"), tmp_path, dtype=wrong)
    with pytest.raises(ValueError, match="labels must be -100, or numbers of classes"):
        model(ids, labels=ids + 200)


def test_the_config_of_fuyus_decoder_takes_arguments_as_others_do():
    """Of a folder of Fuyu, in whose config it is a part."""
    folder = ROOT / "checkpoints" / "tiny-fuyu"
    whole = hf.FuyuConfig.from_pretrained(folder).text_config
    cls = type(whole)
    assert cls.from_pretrained(folder).to_dict() == whole.to_dict()
    options = {"num_hidden_layers": 1, "other": 2}
    config, unused = cls.from_pretrained(folder, **options, return_unused_kwargs=True)
    assert type(config) is cls and unused == {"other": 2}
    assert config.num_hidden_layers == 1 != whole.num_hidden_layers
    with pytest.raises(TypeError, match="other"):
        cls.from_pretrained(folder, other=2)
