"""A test of the tests: each of these mistakes must make the comparison with Transformers fail."""

import pytest
import torch

from tests.families import FAMILIES, inputs
from tests.test_parity import TOLERANCE, largest

pytest.importorskip("transformers")
CASES = [pytest.param(f, name, id=f"{f}: {name}") for f in FAMILIES for name in f.mutations]


@pytest.mark.parametrize(("fam", "mutation"), CASES)
def test_a_wrong_model_is_noticed(fam, mutation, monkeypatch):
    ours, theirs = fam.pair()
    ids, _ = inputs(101)
    expected = theirs(ids).logits
    assert largest(ours(ids).logits, expected) < TOLERANCE[torch.float32]
    fam.mutations[mutation](ours, monkeypatch)
    assert largest(ours(ids).logits, expected) > 3 * TOLERANCE[torch.float32]
