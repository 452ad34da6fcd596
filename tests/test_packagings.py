"""Every packaging of a safetensors folder gives the packaging's own numbers, bit for bit, and a model of them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from decoders import model_class, read_config, weights
from decoders.formats import Packed
from tests import folders, packers
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


# ---- What is refused ---------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def edited(folder, kind, of, change_tensors=None, change_config=None):
    packers.write(folder, kind, of)
    if change_tensors:
        with safe_open(folder / "model.safetensors", "pt") as content:
            metadata, stored = content.metadata(), {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        change_tensors(stored)
        save_file(stored, folder / "model.safetensors", metadata=metadata)
    if change_config:
        config = json.loads((folder / "config.json").read_text())
        change_config(config)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def put(name, tensor):
    return lambda stored: stored.update({name: tensor})


def without(name):
    return lambda stored: stored.pop(name)


def state(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def named(**fields):
    return lambda config: config["quantization_config"].update(fields)


ZEROS = torch.zeros(3, 4, dtype=torch.int32)
BNB_STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"
REFUSED = {
    "gptq zeros": ("gptq-4bits", put(f"{Q}.qzeros", ZEROS), None, f"{Q}.qzeros, int32 of .* does not fit scales"),
    "gptq without scales": ("gptq-4bits", without(f"{Q}.scales"), None, f"{Q} has no scales"),
    "gptq without qweight": ("gptq-4bits", without(f"{Q}.qweight"), None, f"{Q}.* has no qweight beside it"),
    "gptq group": ("gptq-4bits", put(f"{Q}.g_idx", torch.full((64,), 9)), None, f"{Q}.g_idx, int64 .* is not one of 2"),
    "gptq format": ("gptq-4bits", None, named(checkpoint_format="marlin"), "GPTQ's format 'marlin' is not supported"),
    "awq version": ("awq", None, named(version="gemv"), "AWQ's version 'gemv' is not supported, only gemm"),
    "bnb state": ("bnb-nf4", put(BNB_STATE, state("{}")), None, "is no JSON of blocksize, dtype and shape"),
    "bnb shape": (
        "bnb-nf4",
        put(BNB_STATE, state('{"shape": [1000000000, 1000000000], "blocksize": 64, "dtype": "float16"}')),
        None,
        "does not hold 1000000000000000000 numbers",
    ),
    "bnb columns": ("bnb-int8", put(f"{Q}.weight_format", torch.tensor(1)), None, "only rows .0. are supported"),
    "mlx bits": ("mlx-4bits", None, lambda c: c["quantization"].update(bits=9), "bits must be a number from 2 to 8"),
    "mlx mode": ("mlx-4bits", None, lambda c: c["quantization"].update(mode="nvfp4"), "mode 'nvfp4' is not supported"),
    "mlx group": ("mlx-4bits", None, lambda c: c["quantization"].update(group_size=64), "does not hold 128 numbers"),
    "ct format": ("ct-int4", None, named(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
    "ct bits": ("ct-int4", None, lambda c: c["quantization_config"].update(config_groups={}), "has num_bits None"),
    "ct shape": ("ct-int4", put(f"{Q}.weight_shape", torch.tensor([64, 10**12])), None, "does not hold .64, 1000000000000."),
    "torchao header": ("torchao-int8", lambda s: s.update({f"{Q}2._weight_qdata": ZEROS}), None, "is not described in the header"),
    "hqq packing": ("hqq-4bits-axis1", put(f"{Q}.packing", state("5bit_u8")), None, "says '5bit_u8', not one of"),
    "hqq shape": ("hqq-4bits-axis1", put(f"{Q}.shape", torch.tensor([10**9, 10**9])), None, f"{Q}.W_q, uint8 .* does not hold"),
    "no config": ("gptq-4bits", None, lambda c: c.pop("quantization_config"), "int32 of .* packed in a way that config.json"),
    "unknown": ("gptq-4bits", None, named(quant_method="aqlm"), "'aqlm' is not supported .*: save it dequantized"),
    "another": ("gptq-4bits", None, named(quant_method="bitsandbytes"), "int32 of .* packed in a way that config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_file_and_key(tmp_path, case):
    """Nothing is made before it is known to fit: sizes are those of the tensors that are there."""
    kind, change_tensors, change_config, message = REFUSED[case]
    folder = edited(tmp_path / "folder", kind, packers.PHI, change_tensors, change_config)
    with pytest.raises(ValueError, match=message) as caught:
        for tensor in weights.tensors(folder).values():
            assert tensor.is_floating_point()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    with pytest.raises(ValueError, match=r"\S"):
        weights.load(packers.PHI.cls(), folder)


@pytest.mark.parametrize("name", ["model.onnx", "openvino_model.xml", "onnx/model.onnx"])
def test_a_program_is_no_checkpoint(tmp_path, name):
    folder = folders.write_config(tmp_path / "folder", packers.PHI)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="(ONNX|OpenVINO) program, .*: get the safetensors"):
        weights.load(packers.PHI.cls(), folder)


def test_gguf_beside_a_packed_folder_is_two_packagings(tmp_path):
    packers.write(tmp_path / "folder", "awq", packers.PHI3)
    (tmp_path / "folder" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="two packagings"):
        weights.tensors(tmp_path / "folder")


def test_tensors_are_dequantised_when_they_are_used(tmp_path):
    packers.write(tmp_path / "folder", "gptq-4bits", packers.PHI)
    found = weights.tensors(tmp_path / "folder")
    stored = found.stored[f"{Q}.weight"]
    assert isinstance(stored, Packed) and stored.kind == "GPTQ int4 by groups of 32"
    assert stored.shape == found[f"{Q}.weight"].shape and stored.dtype == torch.float16
    assert found[f"{Q}.weight"] is not found[f"{Q}.weight"]  # made anew each time, and not kept
