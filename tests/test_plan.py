"""A decoding step in one call gives what the modules give, notices what changes, and leaves the rest to them."""

import copy
import gc
import importlib
import sys
import weakref
from functools import wraps
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from decoders import decoding, gpt_neo, hf, kernels, phi
from decoders.kernels import families, native, sources, step, texts
from decoders.kernels.plan import Guards, NotPlanned, Plan
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


def call(function, *args, **kwargs):
    return function(*args, **kwargs)


def prepared(family, kind=None, **changes):
    model = family.model(**changes)
    return kernels.prepare(kernels.quantize(model, kind) if kind else model)


def base_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if families.is_base_model(m))


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
    assert len(steps) == 4
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


@pytest.mark.parametrize("keep", [0, 1, 3, 9])
def test_logits_are_of_the_positions_asked_for(family, keep, by_modules, steps):
    """Rows of the output layer that nobody asks for are not computed."""
    model, (ids, _) = prepared(family), inputs(101)
    results = []
    for run in (call, by_modules):
        _, cache = run(read, model, ids)
        before = len(steps)
        output = run(model, ids[:, :5], past_key_values=cache, logits_to_keep=keep)
        results.append(output.logits)
        assert (len(steps) - before > 0) == (run is call)
    assert results[0].shape == (len(ids), min(keep or 5, 5), 101)
    torch.testing.assert_close(*results, atol=2e-5, rtol=0)


def test_chosen_positions_and_labels_are_left_to_the_modules(family, by_modules, steps):
    model, (ids, _) = prepared(family), inputs(101)
    for given in ({"logits_to_keep": torch.tensor([0, 2])}, {"labels": ids[:, :4]}):
        results = []
        for run in (call, by_modules):
            _, cache = run(read, model, ids)
            taken = len(steps)
            output = run(model, ids[:, :4], past_key_values=cache, **given)
            results.append((output.logits, output.loss))
        torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)
        assert len(steps) == taken


@pytest.mark.parametrize("typed", [FAMILIES[0], FAMILIES[1]], ids=str)
def test_token_types_are_planned(typed, by_modules, steps):
    model, (ids, _) = prepared(typed), inputs(101)
    types = (ids * 7 + 3) % 101
    results = []
    for run in (call, by_modules):
        _, cache = run(read, model, ids)
        before, logits = len(steps), []
        for n, length in ((0, 1), (1, 3), (4, 1)):
            part = slice(n, n + length)
            given = {"past_key_values": cache, "token_type_ids": types[:, part].contiguous()}
            logits.append(run(model, ids[:, part], **given).logits)
        assert (len(steps) - before) == (3 if run is call else 0)
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(*results, atol=2e-5, rtol=0)
    without = model(ids[:, :1], past_key_values=read(model, ids)[1]).logits
    assert not torch.allclose(without, results[0][:, :1], atol=1e-2)


@pytest.mark.parametrize("rows", [(3, 2), (1, 7), (16, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_up_to_16_rows_are_planned(family, kind, dtype, rows, by_modules, steps):
    """Rows of sequences, drafted tokens and beams, whatever the weights are stored as."""
    model, (B, T) = prepared(family, kind, dtype=dtype), rows
    ids = torch.randint(3, 101, (B, 11 + 2 * T), generator=torch.Generator().manual_seed(0))
    results = []
    for run in (call, by_modules):
        _, cache = run(read, model, ids, parts=(9, 1))
        before = len(steps)
        results.append(run(read, model, ids[:, 10:], cache=cache, parts=(T, T, 1))[0])
        assert run is by_modules or len(steps) - before == 3
    bound = 2e-6 if dtype is torch.float32 else 2e-2
    bound = 2 * max(bound, 1e-2) if kind == "int8" else bound  # where a rounding turns
    found, right = (logits.double() for logits in results)
    assert (found - right).norm() <= bound * right.norm()


def test_more_than_16_rows_take_the_modules(by_modules, steps):
    model, (ids, _) = prepared(FAMILIES[0]), inputs(101)
    for B, T in ((17, 1), (2, 9)):
        _, cache = read(model, ids[:1].repeat(B, 1), parts=(9,))
        model(ids[:1, :T].repeat(B, 1), past_key_values=cache)
    assert not steps


def test_a_base_model_under_another_head_is_planned(steps):
    """Sequence classification has no logits of tokens: its base model has a plan of its own."""
    model, (ids, _) = kernels.prepare(FAMILIES[2].model("ForSequenceClassification")), inputs(101)
    output = model.model(ids[:1, :9], use_cache=True)
    for n in range(9, 12):
        output = model.model(ids[:1, n : n + 1], past_key_values=output.past_key_values)
    whole = model.model(ids[:1, :12]).last_hidden_state[:, -1:]
    torch.testing.assert_close(output.last_hidden_state, whole, atol=2e-5, rtol=0)
    assert len(steps) == 2


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


def tied(model):
    """The output layer gets a matrix of its own, or the embedding's."""
    head = next(m.lm_head for m in model.modules() if hasattr(m, "lm_head"))
    table = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    head.weight = nn.Parameter(2 * head.weight) if head.weight is table.weight else table.weight


def headed(model):
    next(m.lm_head for m in model.modules() if hasattr(m, "lm_head")).weight.mul_(1.5)


def norms(model):
    norm = next(m for m in model.modules() if "norm" in type(m).__name__.lower())
    norm.weight = nn.Parameter(2 * norm.weight)


CHANGES = (in_place, by_data, anew, assigned, replaced, cast, embedded, hooked, overridden, attending, norms)
CHANGES += (tied, headed)


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
    for run in (call, by_modules):
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


UPDATE = "k, v = cache.update(self.layer, k, v)"
WINDOW = f"{UPDATE}\n            if q.shape[2] == 1:\n                k, v = k[:, :, -12:], v[:, :, -12:]"
EDITS = {  # the second is within the rounding of bfloat16, the first shows in no short text
    "a window": (UPDATE, WINDOW),
    "5 percent": ("self.mlp(n)", "1.05 * self.mlp(n)"),
    "a comment": (UPDATE, f"{UPDATE}  # as ever"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_copy_of_a_model_file_is_planned_only_where_nothing_was_edited(
    edit, by_modules, monkeypatch, steps, tmp_path
):
    text, (old, new) = Path(phi.__file__).read_text(), EDITS[edit]
    assert text.count(old) == 1
    (tmp_path / "edited_phi.py").write_text(text.replace(old, new))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_phi", raising=False)
    file = importlib.import_module("edited_phi")
    plain = FAMILIES[2].model(dtype=torch.bfloat16)
    model = file.PhiForCausalLM(file.PhiConfig(**vars(plain.config))).bfloat16().eval()
    model.load_state_dict(plain.state_dict())
    model, (ids, _) = kernels.prepare(model), inputs(101)
    parts = (8, *[1] * 12)
    found, _ = read(model, ids, parts=parts)
    if edit == "a comment":
        assert len(steps) == 11
    else:
        assert torch.equal(found, by_modules(read, model, ids, parts=parts)[0]) and not steps
        assert "is not of a model file as plans know it" in step.planned(model)


def replaced_rotation(model, monkeypatch):
    own = phi.rope_cos_sin
    monkeypatch.setattr(phi, "rope_cos_sin", wraps(own)(lambda *args: own(*args)))


def replaced_update(model, monkeypatch):
    own = phi.KVCache.update
    monkeypatch.setattr(phi.KVCache, "update", lambda self, *args: own(self, *args))


def replaced_in_a_module(model, monkeypatch):
    mlp = model.model.layers[1].mlp
    mlp.forward = mlp.forward


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("change", [replaced_rotation, replaced_update, replaced_in_a_module])
def test_what_is_replaced_before_or_after_a_plan_was_made_ends_it(change, first, steps, monkeypatch):
    """Whatever it computes: nobody looks into it."""
    model, (ids, _) = prepared(FAMILIES[2]), inputs(101)
    if not first:
        read(model, ids)
        assert steps
        steps.clear()
    change(model, monkeypatch)
    read(model, ids)
    assert not steps and "was replaced" in step.planned(model)
    monkeypatch.undo()


def test_a_description_of_each_model_file_is_of_the_file_as_it_is():
    """Where this fails: look whether `plan.py` and `families.py` still tell what the file computes, then write
    what `python -m decoders.kernels.sources` prints."""
    for name, known in sources.DIGESTS.items():
        assert sources.digest((Path(phi.__file__).parent / name).read_text()) == known, name


def test_large_heads_are_rotated(by_modules, steps):
    """1,040 numbers of a head, all of which are rotated."""
    changes = {"hidden_size": 1040, "num_attention_heads": 1, "num_key_value_heads": 1}
    model, (ids, _) = prepared(FAMILIES[2], partial_rotary_factor=1.0, **changes), inputs(101)
    found, right = read(model, ids)[0], by_modules(read, model, ids)[0]
    assert steps and (found - right).norm() <= 1e-5 * right.norm()


def test_a_method_that_was_replaced_before_is_not_planned(by_modules, monkeypatch, steps):
    monkeypatch.setattr(phi.PhiMLP, "forward", lambda self, x: 1.00001 * self.fc2(self.act(self.fc1(x))))
    model, (ids, _) = prepared(FAMILIES[2]), inputs(101)
    found, _ = read(model, ids)
    assert torch.equal(found, by_modules(read, model, ids)[0]) and not steps
    reason = "forward of its model file was replaced"
    assert step.planned(base_of(model)) == f"module by module: {reason}"


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


def test_freed_weights_raise(family):
    """As a loader does that moves weights out of memory: no step reads where nothing is any more."""
    model, (ids, _) = prepared(family), inputs(101)
    _, cache = read(model, ids)
    linear_of(model)[2].weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_moved_weights_are_left_to_the_modules(family, by_modules, steps):
    model, (ids, _) = prepared(family), inputs(101)
    caches = [read(model, ids)[1] for _ in range(2)]
    layer, before = linear_of(model)[2], len(steps)
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    results = []
    for run, cache in zip((call, by_modules), caches, strict=True):
        try:
            results.append(run(model, ids[:, :1], past_key_values=cache, use_cache=True).logits.device)
        except Exception as error:
            results.append((type(error), str(error)))
    assert results[0] == results[1] and len(steps) == before


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
        for run in (call, by_modules):
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
    for run in (call, by_modules):
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
        Plan(base_of(model), Guards(base_of(model)))


def test_a_plan_has_as_many_threads_as_its_work_is_worth(monkeypatch):
    model = prepared(FAMILIES[2])
    plan = Plan(model, Guards(model))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert plan.threads() == 1  # it has less than a megabyte of weights
    monkeypatch.setattr("decoders.kernels.plan.SINGLE_THREAD_BYTES", 0)
    assert plan.threads() == 7


# ---- Transformers' names -----------------------------------------------------------------------------------


def test_documented_models_take_planned_steps_unless_somebody_looks(by_modules, steps):
    """In `generate`, with beams too, and in a loop of one's own; the plan outlives the call."""
    model = hf.AutoModelForCausalLM.from_pretrained("checkpoints/tiny-phi3")
    ids = torch.randint(3, 900, (1, 9), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"num_beams": 3}):
        given, before = {"max_new_tokens": 12, "do_sample": False, **options}, len(steps)
        found = model.generate(ids, **given)
        assert len(steps) > before + 8
        assert torch.equal(found, by_modules(model.generate, ids, **given))
    before, output = len(steps), model(ids, use_cache=True)
    for _ in range(3):
        output = model(ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
    assert len(steps) == before + 3
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    model.generate(ids, max_new_tokens=5)
    hook.remove()
    assert len(steps) == before + 3
