"""What PyTorch offers works on the model files as they are."""

import math
import warnings

import pytest
import torch

from tests.families import inputs


def test_compiled_models_equal_eager_ones(family):
    """One graph, with and without a mask, without any break."""
    torch._dynamo.reset()
    model = family.model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = inputs(101, padded=True)
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(compiled(ids, **options).logits, model(ids, **options).logits, atol=2e-5, rtol=0)


def test_strict_export_with_a_dynamic_length(family):
    model, length = family.model(), torch.export.Dim("T", min=2, max=60)
    ids, mask = inputs(101)
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        shapes = {**{name: {1: length} for name in given}, "use_cache": None}
        exported = torch.export.export(model, (), {**given, "use_cache": False}, dynamic_shapes=shapes, strict=True)
        shorter = {name: value[:, :11] for name, value in given.items()}
        expected = model(**shorter).logits
        torch.testing.assert_close(exported.module()(**shorter, use_cache=False).logits, expected, atol=2e-5, rtol=0)


def test_fresh_models_start_at_the_loss_of_a_guess(family):
    model = family.cls()(family.config()).eval()
    ids, _ = inputs(101)
    assert abs(model(ids, labels=ids).loss.item() - math.log(101)) < 0.5


def test_training_half_precision_weights_is_warned_of_once(family):
    for dtype, count in ((torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 0)):
        model = family.model(dtype=dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train().train()
        assert len(caught) == count and all("Train float32 weights" in str(warning.message) for warning in caught)


def test_gradient_checkpointing_changes_no_gradient_in_any_family(family):
    none = {key: 0.0 for key in family.config().to_dict() if key.endswith(("_dropout", "_pdrop"))}
    plain, saving = family.model(**none).train(), family.model(**none).train()
    saving.gradient_checkpointing_enable()
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
    mask = look if kind.startswith("true") else torch.zeros(look.shape).masked_fill(~look, torch.finfo(torch.float32).min)
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
