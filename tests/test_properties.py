"""What must hold of a decoder whatever the reference says: no Transformers needed."""

import pytest
import torch

from decoders import decoding, kernels
from tests.families import BATCH, FAMILIES, LENGTH, PADDED, inputs

CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(params=[True, False], ids=["fast", "spelled out"])
def path(request) -> dict:
    """Arguments that choose the attention path."""
    return {} if request.param else {"output_attentions": True}


def trained(model) -> list[torch.nn.Parameter]:
    """What a text without pictures reaches."""
    return [p for name, p in model.named_parameters() if not name.startswith("vision_")]


@pytest.mark.parametrize("chunks", [[LENGTH], [10, 13], [1] * LENGTH, [3, 1, 12, 1, 1, 5], [22, 1]], ids=str)
def test_chunks_equal_one_pass(family, path, chunks):
    model = family.model()
    ids, _ = inputs(101)
    expected, past, parts = model(ids).logits, None, []
    for part in ids.split(chunks, dim=1):
        output = model(part, past_key_values=past, **path)
        past = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


def test_both_attention_paths_agree(family):
    """In outputs and in gradients, whichever side is padded."""
    for padded in ("no", "left", "right"):
        model = family.model()
        ids, mask = inputs(101, padded == "left")
        if padded == "right":
            mask[0, -PADDED:] = 0
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        a = model(ids, attention_mask=mask, labels=ids)
        b = model(ids, attention_mask=mask, labels=ids, output_attentions=True)
        torch.testing.assert_close(logits, b.logits, **CLOSE)
        torch.testing.assert_close(a.logits, b.logits, **CLOSE)
        gradients = [torch.autograd.grad(output.loss, trained(model)) for output in (a, b)]
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_left_padding_changes_nothing(family, path):
    model = family.model()
    ids, mask = inputs(101, padded=True)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = model(ids, attention_mask=mask, position_ids=places, **path).logits
    alone = model(ids[:1, PADDED:], **path).logits
    torch.testing.assert_close(batch[:1, PADDED:], alone, **CLOSE)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(family, path):
    model = family.model()
    ids, mask = inputs(101, padded=True)
    other = torch.cat([ids[:1], ids[1:].flip(1)])
    kept = model(ids, attention_mask=mask, **path).logits[0]
    torch.testing.assert_close(model(other, attention_mask=mask, **path).logits[0], kept, **CLOSE)


def test_a_token_does_not_depend_on_later_ones(family, path):
    model = family.model()
    ids, _ = inputs(101)
    changed = ids.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 101
    before, after = model(ids, **path).logits, model(changed, **path).logits
    torch.testing.assert_close(after[:, :15], before[:, :15], **CLOSE)
    assert not torch.allclose(after[:, 15:], before[:, 15:], atol=1e-2)


def test_rows_of_padding_look_at_themselves(family):
    """Neither at the future, as in the reference, nor at other padding; on both paths."""
    model = family.model()
    ids, mask = inputs(101, padded=True)
    for layer in model(ids, attention_mask=mask, output_attentions=True).attentions:
        assert torch.equal(layer[0, :, :PADDED], torch.eye(LENGTH)[:PADDED].expand_as(layer[0, :, :PADDED]))


def test_left_padding_has_the_right_gradient_from_the_fused_kernel(family):
    """With a row of lowest numbers in the mask it is wrong: log(n) drowns in them. In float64, also of those rows."""
    for window in (None, 3):
        model = family.model(
            dtype=torch.float64, **({"sliding_window": window} if family.name == "phi3" else {})
        )
        ids, mask = inputs(101, padded=True)
        outputs = [model(ids, attention_mask=mask, output_attentions=whole).logits for whole in (False, True)]
        torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)
        gradients = [torch.autograd.grad(logits.square().mean(), trained(model)) for logits in outputs]
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_padding_are_finite(family, path, dtype):
    model = family.model(dtype=dtype)
    ids, mask = inputs(101, padded=True)
    mask[1] = 0
    output = model(ids, attention_mask=mask, **path)
    assert output.logits.isfinite().all()
    step = model(
        ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], 1), past_key_values=output.past_key_values
    )
    assert step.logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_huge_scores_stay_finite_in_half_precision(family, path, dtype):
    """q and k a hundred times too large overflow float16 unless scores are float32."""
    model = family.model(dtype=dtype)
    for name, p in model.named_parameters():
        if any(part in name for part in family.scores):
            p.data *= 100
    ids, _ = inputs(101)
    output = model(ids, **path)
    assert output.logits.isfinite().all()
    assert model(ids[:, :1], past_key_values=output.past_key_values, **path).logits.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 1), (3, 61)], ids=str)
def test_odd_sizes(family, shape):
    model = family.model()
    ids = torch.randint(0, 101, shape)
    assert model(ids).logits.shape == (*shape, 101)
    assert model.generate(ids, max_new_tokens=2, eos_token_id=None).shape == (shape[0], shape[1] + 2)


# ---- Cache


def test_a_tuple_serves_as_past_and_is_left_alone(family):
    model = family.model()
    ids, _ = inputs(101)
    past = tuple((k.clone(), v.clone()) for k, v in model(ids[:, :9]).past_key_values)
    copies = [(k.clone(), v.clone()) for k, v in past]
    expected = model(ids).logits[:, 9:]
    for _ in range(2):
        torch.testing.assert_close(model(ids[:, 9:], past_key_values=past).logits, expected, **CLOSE)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(past, copies, strict=True))


def test_cache_grows_by_doubling_and_never_copies_in_between(family):
    model = family.model()
    ids = inputs(101)[0]
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
        addresses = []
        for i in range(8, 20):
            model(ids[:, i : i + 1], past_key_values=cache)
            addresses.append(cache[0][0].data_ptr())
    assert len(cache) == 20 and len(set(addresses[:8])) == 1 and len(set(addresses)) == 2


def test_cache_truncates_and_reorders(family):
    model = family.model()
    ids, _ = inputs(101)
    expected = model(ids).logits
    with torch.no_grad():
        cache = model(ids[:, :9]).past_key_values
        model(ids[:, 3:7], past_key_values=cache)  # a wrong guess
        cache.truncate(9)
        assert len(cache) == 9
        torch.testing.assert_close(model(ids[:, 9:], past_key_values=cache).logits, expected[:, 9:], **CLOSE)
        cache.truncate(9)
        cache.reorder(torch.tensor([1, 0]))
        swapped = model(ids[:, 9:].flip(0), past_key_values=cache).logits
        torch.testing.assert_close(swapped.flip(0), expected[:, 9:], **CLOSE)
    with pytest.raises(IndexError):
        cache[3]


def test_gradients_flow_through_the_cache(family):
    """Three chunks in training: what is written later must not spoil what autograd remembers."""
    model = family.model()
    ids, _ = inputs(101)
    past, logits = None, []
    for part in ids.split([9, 1, 13], dim=1):
        output = model(part, past_key_values=past)
        past = output.past_key_values
        logits.append(output.logits)
    torch.cat(logits, 1).square().sum().backward()
    chunked = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    for p, gradient in zip(trained(model), chunked, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_under_autograd_equals_one_without(family, dtype):
    """The fast kernels work in shared memory, which autograd could not follow."""
    model = kernels.prepare(family.model(dtype=dtype))
    ids, mask = inputs(101, padded=True)
    mask[0, -1] = 1
    steps = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            cache = model(ids[:, :-2], attention_mask=mask[:, :-2]).past_key_values
            model(ids[:, -2:-1], attention_mask=mask[:, :-1], past_key_values=cache)
            steps.append(model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits)
    assert steps[0].requires_grad and not steps[1].requires_grad
    torch.testing.assert_close(steps[0], steps[1], atol=2e-5 if dtype == torch.float32 else 0.1, rtol=0)
    steps[0].square().sum().backward()


def test_use_cache_false_returns_none(family):
    model = family.model()
    assert model(inputs(101)[0], use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(inputs(101)[0]).past_key_values is None


# ---- Generation


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_the_argmax_of_repeated_full_passes(family, use_cache):
    model = family.model()
    ids, _ = inputs(101)
    expected = ids
    for _ in range(25):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert (
        model.generate(ids, max_new_tokens=25, eos_token_id=None, use_cache=use_cache).tolist()
        == expected.tolist()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_batches_generate_what_single_rows_do(family, dtype):
    model = family.model(dtype=dtype)
    ids, mask = inputs(101, padded=True)
    batch = model.generate(ids, mask, max_new_tokens=20, eos_token_id=None)
    alone = model.generate(ids[:1, PADDED:], max_new_tokens=20, eos_token_id=None)
    if dtype == torch.float32:
        assert batch[0, PADDED:].tolist() == alone[0].tolist()
    else:  # rounding may tip a near tie: score both texts in one pass instead
        logits = model(batch[:1, PADDED:]).logits.float()[0, LENGTH - PADDED - 1 : -1]
        chosen = logits.gather(1, batch[0, LENGTH:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 0.15


def test_a_conversation_keeps_its_cache(family):
    """A cache given to generate holds the beginning of the prompt, and in the end all but the last token."""
    model = family.model()
    ids, _ = inputs(101)
    cache = family.module.KVCache()
    first = model.generate(ids[:, :5], max_new_tokens=4, eos_token_id=None, past_key_values=cache)
    assert len(cache) == 8
    prompt = torch.cat([first, ids[:, :6]], 1)
    lengths = []
    getattr(model, family.base).register_forward_hook(
        lambda m, inputs, output: lengths.append(inputs[0].shape[1])
    )
    second = model.generate(prompt, max_new_tokens=4, eos_token_id=None, past_key_values=cache)
    assert lengths == [7, 1, 1, 1] and len(cache) == 18
    assert second.tolist() == model.generate(prompt, max_new_tokens=4, eos_token_id=None).tolist()
    with pytest.raises(ValueError, match="holds 18 tokens of a prompt of 15: one must be new"):
        model.generate(prompt, max_new_tokens=4, past_key_values=cache)


def test_repetition_penalty_leaves_padding_alone(family):
    model = family.model()
    ids, mask = inputs(101, padded=True)
    options = {"max_new_tokens": 20, "eos_token_id": None, "repetition_penalty": 3.0}
    alone = decoding.generate(model, ids[:1, PADDED:], **options)[0]
    assert decoding.generate(model, ids, mask, **options)[0, PADDED:].tolist() == alone.tolist()


def test_stop_ids_come_from_the_checkpoint_unless_given(family):
    model = family.model()
    ids = inputs(101)[0][:1]
    free = model.generate(ids, max_new_tokens=20, eos_token_id=None)[0, LENGTH:].tolist()
    stop = free[5]
    n = free.index(stop) + 1
    model.config.eos_token_id = stop
    assert model.generate(ids, max_new_tokens=20).shape[1] == LENGTH + n
    model.generation_config = {"eos_token_id": [free[0], 3]}
    assert model.generate(ids, max_new_tokens=20).shape[1] == LENGTH + 1
    assert model.generate(ids, max_new_tokens=20, eos_token_id=None).shape[1] == LENGTH + 20


def test_generator_makes_sampling_repeatable(family):
    model = family.model()
    ids, _ = inputs(101)
    texts = [
        model.generate(ids, max_new_tokens=20, do_sample=True, eos_token_id=None,
                       generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]


def test_processors_criteria_and_streamer(family):
    model = family.model()
    ids = inputs(101)[0][:1]
    got = []

    class Streamer:
        put = staticmethod(lambda value: got.append(value.clone()))
        end = staticmethod(lambda: got.append("end"))

    def only_even(ids, logits):
        assert logits.dtype == torch.float32
        return logits.masked_fill(torch.arange(101) % 2 == 1, -torch.inf)

    result = decoding.generate(model, ids, max_new_tokens=30, eos_token_id=None, logits_processor=[only_even], streamer=Streamer(),
                                 stopping_criteria=[lambda ids, logits: ids.shape[1] >= LENGTH + 4])  # fmt: skip
    new = result[0, LENGTH:]
    assert len(new) == 4 and (new % 2 == 0).all()
    assert torch.equal(got[0], ids) and [t.tolist() for t in got[1:-1]] == [[t] for t in new.tolist()]
    assert got[-1] == "end"


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": -1}, "max_new_tokens must be a whole number from 0 on, not -1"),
    ({"do_sample": True, "temperature": 0.0}, "temperature must be .*, not 0.0"),
    ({"do_sample": True, "temperature": float("nan")}, "temperature must be .*, not nan"),
    ({"do_sample": True, "top_k": -1}, "top_k must be .*, not -1"),
    ({"do_sample": True, "top_p": 0.0}, "top_p must be .*, not 0.0"),
    ({"do_sample": True, "top_p": 1.1}, "top_p must be .*, not 1.1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be .*, not 0.0"),
])  # fmt: skip
def test_wrong_options_are_said(family, options, message):
    model = family.model()
    with pytest.raises(ValueError, match=message):
        decoding.generate(model, inputs(101)[0], **{"max_new_tokens": 3, **options})
    if "max_new_tokens" in options:
        with pytest.raises(ValueError, match=message):
            model.generate(inputs(101)[0], **options)


def test_empty_prompts_are_said(family):
    with pytest.raises(ValueError, match="one token at least, not .1, 0."):
        family.model().generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3)


def test_texts_longer_than_the_positions_are_said(family):
    model = family.model()
    if not hasattr(model, "max_positions"):
        pytest.skip("no limit in this family")
    full = torch.zeros(1, 67, dtype=torch.long)
    assert model.generate(full, max_new_tokens=1, eos_token_id=None).shape == (1, 68)
    with pytest.raises(ValueError, match="67 prompt .* 2 new .* 67 positions"):
        model.generate(full, max_new_tokens=2)
    with pytest.raises(ValueError, match="68 tokens, .* 67 positions"):
        model(full[:, :1], past_key_values=model(full).past_key_values)


# ---- Arguments


def test_unknown_arguments_are_a_type_error(family):
    ids, _ = inputs(101)
    for head in ("Model", "ForCausalLM", *family.heads):
        with pytest.raises(TypeError, match="atention_mask"):
            family.model(head)(ids, atention_mask=None)
    with pytest.raises(TypeError, match="top_q"):
        family.model().generate(ids, max_new_tokens=1, top_q=0.5)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 22), torch.ones(2, 1, 22, 23), torch.ones(2, 1, 1, 23), torch.ones(23)], ids=str
)
def test_masks_of_another_shape_are_said(family, mask):
    with pytest.raises(ValueError, match="attention_mask must be"):
        family.model()(inputs(101)[0], attention_mask=mask)


def test_ids_and_vectors_exclude_each_other(family):
    model = family.model()
    for given in ({}, {"input_ids": inputs(101)[0], "inputs_embeds": torch.zeros(2, 23, 48)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**given)
    with pytest.raises(ValueError, match="input_ids must be"):
        model(torch.zeros(2, 3, 4, dtype=torch.long))


def test_new_weights_are_drawn_as_documented(family):
    model = family.cls()(family.config(initializer_range=0.5)).init_weights()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert 0.4 < p.std() < 0.6, name


def test_training_learns(family):
    """Thirty steps on one batch: the loss must fall to a fraction."""
    none = {key: 0.0 for key in family.config().to_dict() if key.endswith(("_dropout", "_pdrop"))}
    model = family.model(**none).train()
    ids, _ = inputs(101)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and BATCH == 2


# ---- Odd arguments


@torch.no_grad()
def test_an_empty_batch_gives_empty_results(family):
    model, (ids, mask) = family.model(), inputs(101)
    for options in ({}, {"attention_mask": mask[:0]}, {"output_attentions": True}):
        assert model(ids[:0], **options).logits.shape == (0, 23, 101)
    assert model.generate(ids[:0], max_new_tokens=2).shape == (0, 24)


def test_positions_of_one_row_serve_all(family):
    model, (ids, _) = family.model(), inputs(101)
    places = torch.arange(23) + 3
    found = model(ids, position_ids=places, use_cache=False).logits
    assert torch.equal(found, model(ids, position_ids=places.expand(2, 23), use_cache=False).logits)


def test_labels_that_all_are_left_out_give_no_loss(family):
    """The mean of nothing is NaN, as in Transformers."""
    model, (ids, _) = family.model(), inputs(101)
    assert model(ids, labels=torch.full_like(ids, -100)).loss.isnan()


@pytest.mark.parametrize("warm", [False, True])
def test_an_unknown_argument_of_generate_is_named(family, warm):
    model, (ids, _) = family.model(), inputs(101)
    cache = model(ids[:, :9]).past_key_values if warm else None
    for name in ("num_beams", "top_q"):
        with pytest.raises(TypeError, match=name):
            model.generate(ids, max_new_tokens=3, past_key_values=cache, **{name: 2})


def test_token_types_and_head_masks_act_on_every_step():
    """Of GPT-Neo and GPT-1: as passes over the whole text, new tokens with the type of the last one before."""
    for family in (f for f in FAMILIES if f.name in ("gpt_neo", "openai-gpt")):
        model, (ids, _) = family.model(), inputs(101)
        types, heads = torch.randint(0, 101, ids.shape), torch.tensor([1.0, 0, 0.5, 1])
        found, text = (
            model.generate(ids, max_new_tokens=5, eos_token_id=None, token_type_ids=types, head_mask=heads),
            ids,
        )
        for _ in range(5):
            text = torch.cat(
                [
                    text,
                    model(text, token_type_ids=types, head_mask=heads, use_cache=False)
                    .logits[:, -1:]
                    .argmax(-1),
                ],
                1,
            )
            types = torch.cat([types, types[:, -1:]], 1)
        assert torch.equal(found, text)
        assert not torch.equal(found, model.generate(ids, max_new_tokens=5, eos_token_id=None))
