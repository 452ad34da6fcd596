"""A test of the tests: each mistake that `compare` can name must make the comparison with Transformers fail."""

import functools

import pytest
import torch

from decoders.compare import formula
from decoders.formats.config import modern
from tests import plants
from tests.families import FAMILIES, inputs
from tests.test_parity import TOLERANCE, largest

pytest.importorskip("transformers")
CASES = [
    pytest.param(f, m, id=f"{f}: {m.name}")
    for f in FAMILIES
    for m in plants.fitting(f.name)
    if not m.half
    and not m.rounds
    and not m.name.startswith(("loss:", "longrope:", "pictures:", "bias of the picture"))
]


@functools.cache
def right(name: str) -> tuple:
    fam = next(f for f in FAMILIES if f.name == name)
    ours, theirs = fam.pair()
    ids, mask = inputs(101, padded=True)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    given["position_ids"][1] += (
        torch.arange(ids.shape[1]) // 3
    )  # with gaps: a mere shift is nothing to a rotation
    if fam.name in ("gpt_neo", "openai-gpt"):
        given["token_type_ids"] = inputs(60, seed=6)[0]
    return ours, given, mask.bool(), theirs(**given).logits.detach()


@torch.no_grad()
@pytest.mark.parametrize(("fam", "mistake"), CASES)
def test_a_wrong_model_is_noticed(fam, mistake):
    ours, given, real, expected = right(fam.name)
    assert largest(ours(**given).logits[real], expected[real]) < TOLERANCE[torch.float32]
    weights = dict(ours.named_parameters())
    wrong = formula.stages(
        ours.config, {name: w.double() for name, w in weights.items()}, given, mistakes=(mistake,)
    )["logits"]
    if largest(wrong[real], expected[real]) < 6 * TOLERANCE[torch.float32]:
        pytest.skip("shows nothing on this input: the kits of test_compare have one where it does")
    model = plants.planted(fam.name, modern(fam.their_config()), weights, mistake.name)
    logits = model(**given, output_attentions=True).logits[real]
    assert logits.isnan().any() or largest(logits, expected[real]) > 3 * TOLERANCE[torch.float32]
