"""What PyTorch offers works on the model files as they are."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoders import kernels, weights
from tests.families import inputs


def test_compiled_models_equal_eager_ones(family):
    """One graph, with and without a mask, without any break."""
    torch._dynamo.reset()
    model = family.model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = inputs(101, padded=True)
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(
                compiled(ids, **options).logits, model(ids, **options).logits, atol=2e-5, rtol=0
            )


def test_strict_export_with_a_dynamic_length(family):
    model, length = family.model(), torch.export.Dim("T", min=2, max=60)
    ids, mask = inputs(101)
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        shapes = {**{name: {1: length} for name in given}, "use_cache": None}
        exported = torch.export.export(
            model, (), {**given, "use_cache": False}, dynamic_shapes=shapes, strict=True
        )
        shorter = {name: value[:, :11] for name, value in given.items()}
        expected = model(**shorter).logits
        torch.testing.assert_close(
            exported.module()(**shorter, use_cache=False).logits, expected, atol=2e-5, rtol=0
        )


def test_fresh_models_start_at_the_loss_of_a_guess(family):
    model = family.cls()(family.config()).eval()
    ids, _ = inputs(101)
    assert abs(model(ids, labels=ids).loss.item() - math.log(101)) < 0.5


def test_training_half_precision_weights_is_warned_of_once(family, tmp_path):
    """Of a loaded model, and of its copies."""
    for dtype, count in ((torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 0)):
        weights.save(family.model(dtype=dtype), tmp_path)
        model = copy.deepcopy(weights.load(family.cls(), tmp_path))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train().train()
        assert len(caught) == count and all(
            "Train float32 weights" in str(warning.message) for warning in caught
        )


def test_gradient_checkpointing_changes_no_gradient_in_any_family(family):
    none = {key: 0.0 for key in family.config().to_dict() if key.endswith(("_dropout", "_pdrop"))}
    plain, saving = family.model(**none).train(), family.model(**none).train()
    for part in saving.modules():
        part.gradient_checkpointing = True
    ids, _ = inputs(101)
    for model in (plain, saving):
        model(ids, labels=ids).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if not name.startswith("vision_"):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5, msg=name)
    assert saving(ids).past_key_values is None


@pytest.mark.parametrize("kind", ["true where a query looks", "added"])
def test_masks_for_every_query_and_key(family, kind):
    """Block-diagonal: two texts in one row are as two rows."""
    model = family.model()
    ids, _ = inputs(101)
    number = (torch.arange(23) >= 9).long()
    look = ((number[:, None] == number) & torch.ones(23, 23, dtype=torch.bool).tril())[None, None]
    mask = (
        look
        if kind.startswith("true")
        else torch.zeros(look.shape).masked_fill(~look, torch.finfo(torch.float32).min)
    )
    places = torch.cat([torch.arange(9), torch.arange(14)])
    if family.name == "phi3":  # where such a mask replaces the window, as in Transformers
        model = family.model(sliding_window=None)
    logits = model(ids, attention_mask=mask, position_ids=places).logits
    for part in (slice(0, 9), slice(9, 23)):
        torch.testing.assert_close(logits[:, part], model(ids[:, part]).logits, atol=2e-5, rtol=0)


def test_packed_texts_are_kept_apart_as_in_transformers_5(family):
    if family.name == "openai-gpt":
        pytest.skip("no version does so there")
    ours, theirs = family.pair()
    ids, _ = inputs(101)
    places = torch.cat([torch.arange(9), torch.arange(14)])[None].expand(2, -1)
    found = ours(ids, position_ids=places, use_cache=False).logits
    with torch.no_grad():
        assert (found - theirs(ids, position_ids=places, use_cache=False).logits).abs().max() < 2e-5
        alone = ours(ids[:, 9:]).logits
    torch.testing.assert_close(found[:, 9:], alone, atol=2e-5, rtol=0)


# ---- Transforms and other derivatives


def loss_of(model, ids):
    """Of all parameters, as a function."""
    return lambda parameters: (
        torch.func.functional_call(model, parameters, (ids,), {"labels": ids, "use_cache": False}).loss
    )


def test_forward_mode_agrees_with_reverse_mode(family):
    """The derivative of the loss along one direction: jvp in no_grad, and forward AD by hand, prepared or not."""
    ids, _ = inputs(101)
    for prepare in (kernels.plain, kernels.prepare):
        model = prepare(family.model(dtype=torch.float64))
        loss = loss_of(model, ids)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        along = {name: torch.randn_like(p) for name, p in parameters.items()}
        gradient = torch.func.grad(loss)(parameters)
        expected = sum((gradient[name] * along[name]).sum() for name in along)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            found = torch.func.jvp(loss, (parameters,), (along,))[1]
            with forward_ad.dual_level():
                dual = loss({name: forward_ad.make_dual(p, along[name]) for name, p in parameters.items()})
                by_hand = forward_ad.unpack_dual(dual).tangent
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(by_hand, expected, atol=1e-9, rtol=1e-9)


def test_gradients_of_each_sample(family):
    model, (ids, _) = family.model(), inputs(101)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    each = torch.func.vmap(lambda row: torch.func.grad(loss_of(model, row[None]))(parameters))(ids)
    for i, row in enumerate(ids):
        alone = torch.func.grad(loss_of(model, row[None]))(parameters)
        for name, gradient in alone.items():
            torch.testing.assert_close(each[name][i], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("whole", [False, True])
def test_gradcheck(family, whole):
    """Numerical derivatives in float64, on both paths of the attention, and of the loss."""
    model = family.model(dtype=torch.float64)
    x = torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def outputs(x):
        output = model(
            inputs_embeds=x, attention_mask=mask, labels=mask * 7, use_cache=False, output_attentions=whole
        )
        return output.loss, output.logits[..., :9], *(output.attentions or ())[:1]

    assert torch.autograd.gradcheck(outputs, (x,), fast_mode=True)


def test_shapes_on_the_meta_device(family):
    with torch.device("meta"):
        model = family.cls()(family.config())
        output = model(
            torch.zeros(2, 9, dtype=torch.long),
            attention_mask=torch.ones(2, 9),
            labels=torch.zeros(2, 9, dtype=torch.long),
        )
    assert output.logits.is_meta and output.logits.shape == (2, 9, 101) and output.loss.shape == ()


# ---- Lower precision, copies


@torch.no_grad()
def test_quantize_dynamic_finds_every_product(family):
    ids, _ = inputs(101)
    for prepare in (kernels.plain, kernels.prepare):
        model = prepare(family.model())
        expected = model(ids).logits
        linears = sum(isinstance(part, torch.nn.Linear) for part in model.modules())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        assert sum("quantized" in type(part).__module__ for part in quantised.modules()) >= linears > 0
        assert 1e-4 < (quantised(ids).logits - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("prepare", [kernels.plain, kernels.prepare], ids=["plain", "prepared"])
def test_copies_and_pickles_are_the_model(family, prepare, tmp_path):
    model, (ids, _) = prepare(family.model()), inputs(101)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=2e-5, rtol=0)
        other.get_parameter(next(iter(dict(other.named_parameters())))).data.zero_()
    assert next(model.parameters()).abs().sum() > 0, "a copy shares no memory"


def test_a_tied_matrix_has_one_name_in_the_state_dict_of_a_loaded_model(family, tmp_path):
    """As in the hub's files, and as safetensors wants it; either form is taken back."""
    weights.save(family.model(tie_word_embeddings=True), tmp_path)
    model, other = (weights.load(family.cls(), tmp_path) for _ in range(2))
    base = getattr(model, "language_model", model)
    prefix, state = "language_model." if base is not model else "", model.state_dict()
    output = f"{prefix}lm_head.weight"
    assert base.lm_head.weight is model.get_submodule(family.table).weight and output not in state
    for given in (state, {**state, output: base.lm_head.weight}):
        other.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
        other.load_state_dict(given)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    base.lm_head.weight = torch.nn.Parameter(torch.zeros_like(base.lm_head.weight))
    assert output in model.state_dict(), "what is no longer tied is kept"
    weights.save(model, tmp_path)
    assert output in load_file(tmp_path / "model.safetensors")


def test_a_tied_matrix_is_stored_once_and_loads_under_either_name(family, tmp_path):
    """Into a model that was made, and not loaded, too: there the output layer may be missing."""
    model = family.model(tie_word_embeddings=True)
    embedding, output = f"{family.table}.weight", f"{family.output}.weight"
    weights.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert embedding in stored and output not in stored
    for names in ((embedding,), (output,), (embedding, output)):
        given = {**stored, output: stored[embedding].clone()}
        save_file(
            {n: t for n, t in given.items() if n not in (embedding, output) or n in names},
            tmp_path / "model.safetensors",
        )
        loaded = weights.load(family.cls(), tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
        assert loaded.get_submodule(family.output).weight is loaded.get_submodule(family.table).weight
    other = family.model(tie_word_embeddings=True, seed=7)
    missing, unexpected = other.load_state_dict(stored, strict=False)
    assert missing == [output] and not unexpected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_attentions_of_bfloat16_have_gradients(family):
    model, (ids, _) = family.model(dtype=torch.bfloat16), inputs(101)
    output = model(ids, output_attentions=True)
    sum(weights.square().sum() for weights in output.attentions).backward()
    assert (
        model.get_parameter(
            next(
                n
                for n, _ in model.named_parameters()
                if any(k in n for k in ("q_proj", "qkv", "c_attn", "query_key"))
            )
        )
        .grad.abs()
        .sum()
        > 0
    )
