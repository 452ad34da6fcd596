"""Every packaging of a safetensors folder gives the packaging's own numbers, bit for bit, and a model of them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from decoders import model_class, read_config, weights
from tests import packers
from tests.families import Family

SAMPLES = Path(os.environ.get("DECODERS_TEST_DATA", "")) / "packed"
CASES = [(kind, family) for kind, made in packers.KINDS.items() for family in made.families]


def names_of_cases(value: object) -> str:
    return value.name if isinstance(value, Family) else str(value)


def assert_equal(found, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found and name.endswith("lm_head.weight"):
            continue  # tied, and stored once
        ours = found[name]
        assert ours.dtype == tensor.dtype, name
        assert torch.equal(ours, tensor), name


@pytest.mark.parametrize(("kind", "of"), CASES, ids=names_of_cases)
def test_a_packaging_gives_its_own_numbers_bit_for_bit(tmp_path, kind, of):
    expected = packers.write(tmp_path / "folder", kind, of)
    found = weights.tensors(tmp_path / "folder")
    assert set(found) == set(expected)
    assert_equal(found, expected)


@pytest.mark.parametrize(("kind", "of"), CASES[:: len(CASES) // 12], ids=names_of_cases)
def test_a_packed_folder_is_the_model_of_its_plain_weights(tmp_path, kind, of):
    """In the dtype that is asked for: the packaging's own numbers, converted once."""
    expected = packers.write(tmp_path / "folder", kind, of)
    model = weights.load(of.cls(), tmp_path / "folder", dtype=torch.float32)
    state = model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.float()), name
    assert "quantization_config" not in model.config_json


@pytest.mark.parametrize(
    "name", [p.name for p in sorted(SAMPLES.glob("*")) if (p / "model.safetensors").exists()]
)
def test_samples_of_the_tools_themselves(name):
    folder = SAMPLES / name
    expected = load_file(folder / "expected.safetensors")
    assert_equal(weights.tensors(folder), expected)
    model = weights.load(model_class(read_config(folder)), folder)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


if not SAMPLES.is_dir():

    @pytest.mark.skip(reason="DECODERS_TEST_DATA is not set")
    def test_samples_of_the_tools_themselves_are_somewhere():
        """So that their absence is seen."""
