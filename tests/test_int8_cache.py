"""Keys and values of 8 bits: what is read is what is stored, by every operator and every way to decode."""

import copy
import pickle

import pytest
import torch

from decoders import decoding, kernels, phi, phi3
from decoders.kernels import native, step, texts
from decoders.kernels.int8_cache import Int8Cache, Rows, dequantize_rows, quantize_rows
from tests.families import FAMILIES, LONGROPE, PADDED, PHI3, inputs

PARTS = (PADDED + 4, 1, 1, 2, 1, 4)  # a prompt, steps, and drafted tokens
TURNED = 3e-3  # of the logits: a difference in the last bit may round a number to another step
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def without_gradients():
    native.wait()
    with torch.no_grad():
        yield


@pytest.fixture(params=["plan", "modules", "operators"])
def way(request, monkeypatch):
    """How a step is computed: in one call, module by module, by PyTorch's operators alone."""
    if request.param != "operators" and not native.is_available():
        pytest.skip(f"the kernels are {native.status()}")
    if request.param == "modules":
        monkeypatch.setattr(texts, "step", lambda *args: None)
    if request.param == "operators":
        with native.without():
            yield request.param
    else:
        yield request.param


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps that were planned."""
    taken, finish = [], step.finish
    monkeypatch.setattr(step, "finish", lambda *args: taken.append(args) or finish(*args))
    return taken


def prepared(family, **changes):
    return kernels.prepare(family.model(**changes), cache="int8")


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


def distance(a, b):
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- A row -------------------------------------------------------------------------------------------------


def test_a_number_is_half_a_step_off_at_most_and_the_largest_exact():
    x = torch.randn(2, 3, 5, 24)
    x[0, 0, 0] = 0
    scale = x.abs().amax(-1, keepdim=True) / 127
    found = dequantize_rows(quantize_rows(x), torch.float64)
    assert ((found - x).abs() <= scale / 2 * 1.0001).all() and not found[0, 0, 0].any()
    at = x.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(found.float().gather(-1, at), x.gather(-1, at))
    again = dequantize_rows(quantize_rows(found.float()), torch.float64)
    torch.testing.assert_close(again, found, atol=1e-6, rtol=0)


def test_a_nan_stays_in_its_row():
    x = torch.randn(1, 2, 3, 8)
    x[0, 1, 1, 5] = torch.nan
    found = dequantize_rows(quantize_rows(x), torch.float32).isnan()
    assert found[0, 1, 1].all() and found.sum() == 8


def test_a_cache_takes_half_the_memory_of_16_bits():
    model = phi.PhiForCausalLM(
        phi.PhiConfig(vocab_size=11, hidden_size=160, num_attention_heads=2, num_hidden_layers=2)
    )
    ids = torch.zeros(1, 64, dtype=torch.long)
    exact, rounded = kernels.new_cache(model), kernels.new_cache(model, "int8")
    for cache in (exact, rounded):
        model.bfloat16()(ids, past_key_values=cache)
    sizes = [sum(t.nbytes for pair in cache.buffers for t in pair) for cache in (exact, rounded)]
    assert sizes[1] == sizes[0] * (80 + 4) / 160


# ---- Numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ways_give_the_same_numbers(family, dtype, padded, way, steps):
    """Those of one pass that reads what the cache holds, by a plain model; and not the exact ones."""
    model, (ids, mask) = prepared(family, dtype=dtype), inputs(101, padded=padded)
    found, cache = read(model, ids, mask if padded else None)
    assert isinstance(cache, Int8Cache) and len(cache) == sum(PARTS)
    assert len(steps) >= 4 if way == "plan" else not steps
    plain, n = family.model(dtype=dtype), sum(PARTS)
    places = (mask[:, :n].cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask[:, :n], "position_ids": places}
    right = plain(ids[:, :n], past_key_values=kernels.new_cache(plain, "int8"), **given).logits
    exact = plain(ids[:, :n], **given).logits
    real = mask[:, :n].bool()
    bound = {torch.float32: TURNED, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    assert distance(found[real], right[real]) < bound
    if dtype is torch.float32:
        assert distance(found[real], exact[real]) > 2 * distance(found[real], right[real]) > 0


def test_a_sequence_alone_equals_the_same_in_a_batch(family, way):
    model, (ids, mask) = prepared(family), inputs(101, padded=True)
    found, _ = read(model, ids, mask)
    for row in range(len(ids)):
        own = ids[row : row + 1, mask[row].bool()]
        skipped = ids.shape[1] - own.shape[1]
        alone, _ = read(model, own, parts=(PARTS[0] - skipped, *PARTS[1:]))
        assert distance(alone[0], found[row, skipped:]) < TURNED


def test_what_was_truncated_is_read_anew(family, way):
    """And a cache that was cut to nothing is an empty one."""
    model, (ids, _) = prepared(family), inputs(101)
    right, cache = read(model, ids)
    for n in (6, 0, 99):
        cache.truncate(n)
        n = min(n, sum(PARTS))
        assert len(cache) == n
        assert all(k.shape[2] == v.shape[2] == n for k, v in cache)
        if n < sum(PARTS):
            found, cache = read(model, ids[:, n:], parts=(1, 2, sum(PARTS) - n - 3), cache=cache)
            assert distance(found, right[:, n:]) < TURNED


def test_sequences_are_reordered_as_beams_do(family, way):
    model, (ids, _) = prepared(family), inputs(101)
    _, cache = read(model, ids)
    before, index = copy.deepcopy(cache), torch.tensor([1, 1, 0])
    cache.reorder(index)
    for pair, old in zip(cache, before, strict=True):
        assert all(torch.equal(t, u[index]) for t, u in zip(pair, old, strict=True))
    nxt = ids[:, sum(PARTS) :][:, :1]
    found = model(nxt[index], past_key_values=cache).logits
    right = model(nxt, past_key_values=before).logits
    assert distance(found, right[index]) < TURNED


@pytest.mark.parametrize("options", [
    {},
    {"num_beams": 3},
    {"prompt_lookup_num_tokens": 3},
    {"num_return_sequences": 2, "do_sample": True},
    {"penalty_alpha": 0.6, "top_k": 3},
    {"prefill_chunk_size": 3},
    {"guidance_scale": 1.5},
], ids=str)  # fmt: skip
def test_every_way_to_decode_writes_the_same_text(family, options, way):
    """As it does with PyTorch's operators and without plans."""
    given = {"max_new_tokens": 12, "eos_token_id": None, "return_dict_in_generate": True, **options}
    ids, results = inputs(101)[0][:1], []
    for model in (prepared(family), prepared(family)):
        torch.manual_seed(0)
        if results:
            with native.without():
                results.append(decoding.generate(model, ids, **given))
        else:
            results.append(decoding.generate(model, ids, **given))
    assert torch.equal(results[0].sequences, results[1].sequences)


def test_a_text_that_outgrows_longropes_short_factors_is_read_anew(way):
    """Its keys are rotated anew, and rounded anew."""
    model, (ids, _) = prepared(PHI3, **LONGROPE, sliding_window=None), inputs(101)
    cache = kernels.new_cache(model, "int8")
    assert isinstance(cache, phi3.LongropeCache)
    found = model.generate(ids[:, :7], max_new_tokens=24, eos_token_id=None, past_key_values=cache)
    whole = kernels.new_cache(model, "int8")
    model(found[:, :-1], past_key_values=whole)
    assert cache.rope.all() and torch.equal(cache.rope, whole.rope)
    for pair, other in zip(cache, whole, strict=True):
        assert all(distance(a, b) < TURNED for a, b in zip(pair, other, strict=True))
    cache.reorder(torch.tensor([0, 0, 1]))
    assert cache.rope.shape == (3,)


@pytest.mark.parametrize(
    ("windowed", "changes"),
    [
        (PHI3, {"sliding_window": 5}),
        (FAMILIES[0], {"window_size": 3}),
        (FAMILIES[2], {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 20}),
    ],
    ids=str,
)
def test_windows_and_dynamic_scaling(windowed, changes, way):
    """Where dynamic NTK reads the whole text anew at each token, it keeps no cache."""
    model, (ids, _) = prepared(windowed, **changes), inputs(101)
    given = {"max_new_tokens": 20, "eos_token_id": None, "return_dict_in_generate": True}
    result = decoding.generate(model, ids[:, :9], **given)
    assert isinstance(result.past_key_values, type(None) if "rope_scaling" in changes else Int8Cache)
    right = result.sequences[:, :9]
    for _ in range(20):  # each token by one pass over all
        cache = kernels.new_cache(model, "int8")
        right = torch.cat([right, model(right, past_key_values=cache).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(result.sequences, right)


# ---- Who asks for it ---------------------------------------------------------------------------------------


def test_it_is_never_there_by_itself(family):
    ids, _ = inputs(101)
    for model in (family.model(), kernels.prepare(family.model()), kernels.plain(prepared(family))):
        assert not isinstance(model(ids).past_key_values, Int8Cache)
    assert isinstance(kernels.prepare(prepared(family))(ids).past_key_values, Int8Cache)  # as it was
    model = prepared(family)
    assert isinstance(model(ids).past_key_values, Int8Cache)
    assert model(ids, use_cache=False).past_key_values is None
    own = kernels.new_cache(model)
    assert model(ids, past_key_values=own).past_key_values is own
    with torch.enable_grad():
        assert not isinstance(model(ids).past_key_values, Int8Cache)


def test_other_kinds_gradients_and_compiled_steps_are_refused():
    model = prepared(FAMILIES[0])
    for call in (kernels.prepare, kernels.new_cache):
        with pytest.raises(ValueError, match="'int8' or None, not 'int4'"):
            call(model, "int4")
    with pytest.raises(ValueError, match="no model"):
        kernels.new_cache(torch.nn.Linear(2, 2), "int8")
    ids, cache = inputs(101)[0], kernels.new_cache(model, "int8")
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="leave cache='int8' out"):
        decoding.generate(model, ids, max_new_tokens=3, compiled=True)
    with pytest.raises(ValueError, match="cache='int8'"):
        kernels.error(model, ids)


def test_a_cache_is_copied_and_pickled(family):
    model, (ids, _) = prepared(family), inputs(101)
    _, cache = read(model, ids)
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(other) is type(cache) and len(other) == len(cache)
        for pair, own in zip(other, cache, strict=True):
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(pair, own, strict=True))


def test_a_cache_is_made_of_an_exact_one(family):
    exact = family.model()(inputs(101)[0]).past_key_values
    made = type(kernels.new_cache(family.model(), "int8"))(exact)
    for pair, own in zip(made, exact, strict=True):
        for a, b in zip(pair, own, strict=True):
            assert torch.equal(a, dequantize_rows(quantize_rows(b), b.dtype))


def test_operators_that_nobody_expects_see_the_numbers():
    """Somebody else's attention gets what looks like a tensor, and is one."""
    x = torch.randn(2, 3, 5, 8)
    rows = Rows(quantize_rows(x), torch.float32)
    right = dequantize_rows(rows.rows, torch.float32)
    assert rows.shape == x.shape and rows.dtype == x.dtype
    for function in (
        lambda t: t + 1,
        lambda t: t[:, :, -3:],
        lambda t: t[..., 2:4],
        lambda t: t[:, 1],
        lambda t: t @ t.mT,
        lambda t: torch.nn.functional.scaled_dot_product_attention(t, t, t),
        lambda t: torch.cat([t, t]),
    ):
        found = function(rows)
        found = found.dequantize() if isinstance(found, Rows) else found
        assert torch.equal(found, function(right))
    assert isinstance(rows[:, :, -3:], Rows)


def test_the_error_of_the_logits_is_told(family):
    ids, _ = inputs(101)
    model = kernels.prepare(family.model())
    cost = kernels.error(model, ids, cache="int8")
    cache = kernels.new_cache(model, "int8")
    exact, rounded = model(ids).logits, model(ids, past_key_values=cache).logits
    assert cost.logits == pytest.approx(distance(rounded, exact), rel=1e-3) and 1e-4 < cost.logits < 0.05
    both = kernels.error(model, ids, "int8", cache="int8")
    assert both.logits > cost.logits and not kernels.is_quantized(model)
