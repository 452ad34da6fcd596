"""`compare A B`: whether one packaging was made from another, what it cost, and the tensor that says so."""

import json
import math

import pytest
import torch

from decoders.compare import checkpoints, packings
from decoders.formats import Packed
from tests import folders, packers
from tests.families import PHI, PHI3

MLX4 = packers.mlx_config(bits=4, group_size=32)
INT8 = packers.quantized(quant_method="bitsandbytes")
NORM = "model.layers.1.input_layernorm.weight"


def plain_folder(folder, family=PHI3, seed=0):
    folders.write_config(folder, family, **packers.SIZES[family.name])
    model = family.model(seed=seed, **packers.SIZES[family.name])
    folders.safetensors_whole(folder, folders.weights_of_model(model))
    return folder


@pytest.mark.parametrize(
    ("pack", "config", "kind", "error"),
    [
        (packers.rounded_mlx, MLX4, "MLX int4 by groups of 32", 0.08),
        (packers.rounded_bnb8, INT8, "bitsandbytes int8", 0.008),
    ],
)
def test_a_packed_copy_is_the_same_model_rounded(tmp_path, pack, config, kind, error):
    plain = plain_folder(tmp_path / "plain")
    copy = packers.pack_folder(plain, tmp_path / "copy", pack, config)
    for first, second in ((plain, copy), (copy, plain)):
        twins = checkpoints.apart(first, second)
        assert twins.equal
        assert f"is {first}, stored otherwise: 12 tensors are rounded to {kind}" in twins.sentence
        assert len(twins.roundings) == 12
        for one in twins.roundings.values():
            assert 0.2 < one.steps < 0.4 and 0.4 < one.most_steps < 1.1  # root of 1 / 12, and a half
            assert error / 3 < one.relative < error and one.worst >= one.relative * 0.9
        text = str(twins)
        assert "model.layers.*.mlp.down_proj.weight" in text and "layer   1  " in text
        json.dumps(twins.as_json(), allow_nan=False)


def test_what_was_not_made_from_it_is_named(tmp_path):
    plain = plain_folder(tmp_path / "plain")
    other = plain_folder(tmp_path / "other", seed=7)

    def scaled_norm(stored):
        stored[NORM] = stored[NORM] * 1.01

    def swapped(stored):
        a, b = (f"model.layers.{i}.mlp.down_proj" for i in (0, 1))
        for part in ("weight", "scales", "biases"):
            stored[f"{a}.{part}"], stored[f"{b}.{part}"] = stored[f"{b}.{part}"], stored[f"{a}.{part}"]

    for name, edit, witness in (
        ("norm", scaled_norm, NORM),
        ("swap", swapped, "model.layers.0.mlp.down_proj.weight"),
    ):
        copy = packers.pack_folder(plain, tmp_path / name, packers.rounded_mlx, MLX4, edit)
        twins = checkpoints.apart(plain, copy)
        assert not twins.equal
        assert "is not" in twins.sentence and twins.sentence.endswith(f"{witness} says so.")
    copy = packers.pack_folder(plain, tmp_path / "copy", packers.rounded_mlx, MLX4)
    assert not checkpoints.apart(other, copy).equal


def test_a_tolerance_is_a_relative_error(tmp_path):
    plain = plain_folder(tmp_path / "plain")
    copy = packers.pack_folder(plain, tmp_path / "copy", packers.rounded_mlx, MLX4)
    assert checkpoints.apart(plain, copy, tolerance=0.2).equal
    assert not checkpoints.apart(plain, copy, tolerance=0.001).equal


def test_two_packagings_are_measured_in_steps_of_the_coarser(tmp_path):
    plain = plain_folder(tmp_path / "plain")
    four = packers.pack_folder(plain, tmp_path / "four", packers.rounded_mlx, MLX4)
    eight = packers.pack_folder(plain, tmp_path / "eight", packers.rounded_bnb8, INT8)
    twins = checkpoints.apart(eight, four)
    assert twins.equal
    assert {one.kind for one in twins.roundings.values()} == {"MLX int4 by groups of 32"}


def test_steps_of_floats_are_those_between_neighbours():
    w = torch.tensor([[1.0, 1.5, 0.25, -3.0]])
    assert packings.step_of(w, "compressed-tensors float8 (e4m3)").tolist() == [[0.125, 0.125, 0.03125, 0.25]]
    stored = Packed(torch.Size([1, 32]), torch.float32, "Q4_0", 18, lambda dtype: torch.empty(0))
    a, b = torch.arange(32.0)[None], (torch.arange(32.0) / 2).round()[None] * 2
    assert packings.rounding(a, b, a, stored).most_steps == pytest.approx(0.5)


def test_the_perplexity_of_a_text(tmp_path):
    plain = plain_folder(tmp_path / "plain", PHI)
    copy = packers.pack_folder(plain, tmp_path / "copy", packers.rounded_bnb8, INT8)
    ids = list(range(3, 40))
    first, second = (packings.perplexity(folder, ids) for folder in (plain, copy))
    model = PHI.model(**packers.SIZES["phi"])
    logits = model(torch.tensor([ids])).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    assert first == pytest.approx(math.exp(loss), rel=1e-5)
    assert first != second and first == pytest.approx(second, rel=0.1)
