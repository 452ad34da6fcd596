"""A decoding step in one call gives what the modules give, notices what changes, and leaves the rest to them."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn as nn

from decoders import decoding, gpt_neo, kernels, phi
from decoders.kernels import native, step, texts
from decoders.kernels.plan import NotPlanned, Plan, Watch
from tests.families import FAMILIES, LONGROPE, PADDED, PHI3, inputs

PARTS = (PADDED + 4, 1, 1, 2, 1, 4)  # a prompt, steps, and drafted tokens
KINDS = (None, *kernels.KINDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def needs_the_kernels():
    if not native.wait():
        pytest.skip(f"the kernels are {native.status()}")
    with torch.no_grad():
        yield


@pytest.fixture
def by_modules(monkeypatch):
    """A function that runs another one without plans."""

    def run(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(texts, "step", lambda *args: None)
            return function(*args, **kwargs)

    return run


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps that were planned."""
    taken, finish = [], step.finish
    monkeypatch.setattr(step, "finish", lambda *args: taken.append(args) or finish(*args))
    return taken


def prepared(family, kind=None, **changes):
    model = family.model(**changes)
    return kernels.prepare(kernels.quantize(model, kind) if kind else model)


def base_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if texts.is_base_model(m))


def read(model, ids, mask=None, parts=PARTS, cache=None):
    """Logits (B, T, V), read in parts with a cache, and the cache."""
    logits, n = [], 0
    for length in parts:
        n += length
        given = {}
        if mask is not None:
            places = (mask[:, :n].cumsum(-1) - 1).clamp(min=0)
            given = {"attention_mask": mask[:, :n], "position_ids": places[:, n - length :]}
        output = model(ids[:, n - length : n], past_key_values=cache, use_cache=True, **given)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1), cache


# ---- Numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planned_steps_equal_the_modules(family, dtype, kind, padded, by_modules, steps):
    """Logits, keys and values; in float32 to the last bits, else as near as one rounding is."""
    model, (ids, mask) = prepared(family, kind, dtype=dtype), inputs(101, padded=padded)
    found, cache = read(model, ids, mask)
    right, own = by_modules(read, model, ids, mask)
    assert len(steps) >= (3 if kind in ("int4", "int8-weights") and dtype is torch.bfloat16 else 4)
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    bound = max(bound, 2e-2) if kind == "int8" else bound  # where a rounding turns
    pairs = [(found, right), *zip(sum(map(list, cache), []), sum(map(list, own), []), strict=True)]
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()
    assert len(cache) == len(own) == sum(PARTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_as_near_to_the_truth_as_the_modules(family, dtype, by_modules):
    truth, model, (ids, _) = family.model().double(), prepared(family, dtype=dtype), inputs(101)
    exact = truth(ids[:, : sum(PARTS)]).logits
    off = [(logits.double() - exact).norm() for logits, _ in (read(model, ids), by_modules(read, model, ids))]
    assert off[0] <= 1.1 * off[1]


def test_cached_equals_uncached_and_alone_equals_in_a_batch(family, steps):
    model, (ids, mask) = prepared(family), inputs(101, padded=True)
    found, _ = read(model, ids, mask)
    n = sum(PARTS)
    places = (mask[:, :n].cumsum(-1) - 1).clamp(min=0)
    whole = model(ids[:, :n], attention_mask=mask[:, :n], position_ids=places).logits
    torch.testing.assert_close(found[mask[:, :n].bool()], whole[mask[:, :n].bool()], atol=2e-5, rtol=0)
    for row in range(len(ids)):
        own = ids[row : row + 1, mask[row].bool()]
        skipped = ids.shape[1] - own.shape[1]
        alone, _ = read(model, own, parts=(PARTS[0] - skipped, *PARTS[1:]))
        torch.testing.assert_close(alone[0], found[row, skipped:], atol=2e-5, rtol=0)
    assert len(steps) > 8


@pytest.mark.parametrize("threads", [2, 7])
def test_more_threads_than_processors_give_the_same_numbers(family, threads, monkeypatch):
    """They meet after every operation, and sleep where the others are late."""
    model, (ids, _) = prepared(family), inputs(101)
    expected, _ = read(model, ids)
    monkeypatch.setattr(Plan, "threads", lambda self: threads)
    for _ in range(3):
        found, _ = read(model, ids)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2, "do_sample": True}],
                         ids=str)  # fmt: skip
def test_every_way_to_decode_writes_the_same_text(family, options, by_modules, steps):
    model, (ids, _) = prepared(family), inputs(101)
    given = {"max_new_tokens": 12, "eos_token_id": None, **options}
    torch.manual_seed(0)
    found = decoding.generate(model, ids[:1], **given)
    torch.manual_seed(0)
    assert torch.equal(found, by_modules(decoding.generate, model, ids[:1], **given)) and steps


def test_windows_longrope_and_dynamic_scaling(by_modules, steps):
    """Steps across the limit are read anew by the modules."""
    for family, changes in (
        (PHI3, {**LONGROPE, "sliding_window": None}),
        (PHI3, {"sliding_window": 5}),
        (FAMILIES[2], {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 20}),
    ):
        model, (ids, _) = prepared(family, **changes), inputs(101)
        before = len(steps)
        given = {"max_new_tokens": 24, "eos_token_id": None}
        found = model.generate(ids[:, :7], **given)
        assert torch.equal(found, by_modules(model.generate, ids[:, :7], **given))
        assert len(steps) > before + 5, changes


# ---- What changes ------------------------------------------------------------------------------------------


def linear_of(model: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """The first linear layer of the layers, its parent and its name there."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for parent in layers.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear or type(child).__name__ == "Conv1D":
                return parent, name, child
    raise AssertionError


def in_place(model):
    linear_of(model)[2].weight.mul_(1.5)


def by_data(model):
    layer = linear_of(model)[2]
    layer.weight.data = layer.weight.data * 1.5


def anew(model):
    layer = linear_of(model)[2]
    layer.weight = nn.Parameter(layer.weight * 1.5)


def assigned(model):
    state = {name: 1.1 * t for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for part in model.modules():
        if hasattr(part, "tie_weights"):
            part.tie_weights()


def replaced(model):
    parent, name, layer = linear_of(model)
    setattr(parent, name, nn.Sequential(layer, nn.Tanh()))


def cast(model):
    model.half().float()


def embedded(model):
    table = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    table.weight = nn.Parameter(table.weight * 1.5)


def hooked(model):
    linear_of(model)[2].register_forward_hook(lambda module, args, y: 2 * y)


def overridden(model):
    layer = linear_of(model)[2]
    function = layer.forward
    layer.forward = lambda x: 2 * function(x)


def attending(model):
    for module in model.modules():
        if hasattr(type(module), "attend"):
            plain = module.attend
            module.attend = lambda q, k, v, mask, scale, *rest, plain=plain: plain(
                q, k, v, mask, 2 * scale, *rest
            )


def norms(model):
    norm = next(m for m in model.modules() if "norm" in type(m).__name__.lower())
    norm.weight = nn.Parameter(2 * norm.weight)


CHANGES = (in_place, by_data, anew, assigned, replaced, cast, embedded, hooked, overridden, attending, norms)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_plan_notices_what_has_changed(family, change, by_modules, steps):
    model, (ids, _) = prepared(family), inputs(101)
    before, _ = read(model, ids)
    assert steps
    change(model)
    for _ in range(2):
        after, cache = read(model, ids)
        right, _ = by_modules(read, model, ids)
        torch.testing.assert_close(after, right, atol=1e-4, rtol=1e-5)
    assert change is cast or not torch.allclose(after, before, atol=1e-2)


def test_a_change_in_the_middle_of_a_text_is_noticed(family, by_modules):
    model, (ids, _) = prepared(family), inputs(101)
    results = []
    for run in (lambda function, *args, **kwargs: function(*args, **kwargs), by_modules):
        other = copy.deepcopy(model)
        _, cache = run(read, other, ids[:, :12], parts=(9, 1, 1, 1))
        anew(other)
        results.append(run(read, other, ids[:, 12:14], parts=(1, 1), cache=cache)[0])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


def test_a_method_that_is_patched_in_its_class_is_followed(by_modules, monkeypatch):
    model, (ids, _) = prepared(FAMILIES[2]), inputs(101)
    read(model, ids)
    monkeypatch.setattr(phi.PhiMLP, "forward", lambda self, x: 2 * self.fc2(self.act(self.fc1(x))))
    torch.testing.assert_close(read(model, ids)[0], by_modules(read, model, ids)[0], atol=1e-4, rtol=1e-5)


def test_a_model_file_that_was_edited_is_not_planned(by_modules, monkeypatch, steps):
    """Its modules have the same names, but compute something else: the plan's first step shows it."""
    monkeypatch.setattr(phi.PhiMLP, "forward", lambda self, x: 1.2 * self.fc2(self.act(self.fc1(x))))
    model, (ids, _) = prepared(FAMILIES[2]), inputs(101)
    found, _ = read(model, ids)
    assert torch.equal(found, by_modules(read, model, ids)[0]) and not steps
    assert step.planned(base_of(model)) == "module by module: its modules compute something else"


def test_config_and_training_are_followed(by_modules, steps):
    model, (ids, _) = prepared(PHI3, sliding_window=5), inputs(101)
    read(model, ids)
    model.config.sliding_window = 9
    torch.testing.assert_close(read(model, ids)[0], by_modules(read, model, ids)[0], atol=1e-4, rtol=1e-5)
    model.train()
    before = len(steps)
    read(model, ids)
    assert len(steps) == before


def test_a_plan_keeps_no_model_alive(family):
    model, (ids, _) = prepared(family), inputs(101)
    read(model, ids)
    gone = weakref.ref(base_of(model))
    del model
    gc.collect()
    assert gone() is None


def test_copies_have_plans_of_their_own(family, steps):
    model, (ids, _) = prepared(family), inputs(101)
    expected, _ = read(model, ids)
    other = copy.deepcopy(model)
    in_place(other)
    torch.testing.assert_close(read(model, ids)[0], expected, atol=2e-5, rtol=0)
    assert not torch.allclose(read(other, ids)[0], expected, atol=1e-2)


# ---- Bad input ---------------------------------------------------------------------------------------------


def test_ids_that_are_none_raise_as_ever(family):
    model, (ids, _) = prepared(family), inputs(101)
    _, cache = read(model, ids)
    for wrong in (-1, 10**9):
        with pytest.raises(ValueError, match="input_ids must be"):
            model(torch.full((2, 1), wrong), past_key_values=cache, use_cache=True)
        assert len(cache) == sum(PARTS)
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(ids[:, :1], past_key_values=cache, nonsense=1)


def test_a_cache_of_another_batch_or_dtype_is_left_to_the_modules(family, by_modules):
    model, (ids, _) = prepared(family), inputs(101)
    read(model, ids)
    for change in (
        lambda t: t[:1],
        lambda t: t[:1].expand_as(t),
        lambda t: t.double(),
        lambda t: t[..., :-1],
    ):
        errors = []
        for run in (lambda function, *args, **kwargs: function(*args, **kwargs), by_modules):
            _, cache = run(read, model, ids)
            cache.buffers = [(change(k), change(v)) for k, v in cache.buffers]
            try:
                run(model, ids[:, :1], past_key_values=cache, use_cache=True)
                errors.append(None)
            except Exception as error:
                errors.append((type(error), str(error)))
        assert errors[0] == errors[1]


def test_a_text_longer_than_the_positions_raises_as_ever(by_modules):
    model, (ids, _) = prepared(FAMILIES[0], max_position_embeddings=sum(PARTS)), inputs(101)
    _, cache = read(model, ids)
    with pytest.raises(ValueError, match="positions"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_caches_are_cut_reordered_and_shared_with_the_modules(family, by_modules, steps):
    model, (ids, _) = prepared(family), inputs(101)
    results = []
    for run in (lambda function, *args, **kwargs: function(*args, **kwargs), by_modules):
        _, cache = run(read, model, ids)
        cache.truncate(10)
        cache.reorder(torch.tensor([1, 0]))
        logits = [run(model, ids[:, n : n + 1], past_key_values=cache).logits for n in range(10, 13)]
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(*results, atol=2e-5, rtol=0)


def test_a_model_without_a_description_takes_its_modules(steps):
    class Other(gpt_neo.GPTNeoModel):
        pass

    config = FAMILIES[0].model().config
    model, (ids, _) = kernels.prepare(Other(config).eval()), inputs(101)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    model(ids[:, 5:6], past_key_values=cache, use_cache=True)
    assert not steps and "has no description" in step.planned(model)


def test_layers_of_a_kind_that_plans_do_not_know_take_their_modules():
    """As packed files have them, beside those that `quantize` makes."""
    model = prepared(FAMILIES[2], "int8")
    for layer in model.modules():
        if isinstance(layer, kernels.Quantized):
            layer.kind = "int8-weights" if layer is model.lm_head else "another"
    with pytest.raises(NotPlanned, match="a layer is another"):
        Plan(base_of(model), Watch(base_of(model)))
