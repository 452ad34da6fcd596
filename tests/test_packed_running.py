"""`load(..., packed=True)`: layers of the very bits that a packaging stores, and the same logits."""

import copy

import pytest
import torch

from decoders import kernels, weights
from tests import packers
from tests.families import GPT_NEO, OPENAI_GPT, PERSIMMON, PHI, PHI3, inputs

HELD = {  # kind of folder -> kind of layer
    "gptq-4bits": "int4",
    "gptq-symmetric": "int4",
    "gptq-v2": "int4",
    "gptq-without-index": "int4",
    "awq": "int4",
    "ct-int4": "int4",
    "ct-int4-asymmetric": "int4",
    "ct-int8-plain": "int8-weights",
    "torchao-int4": "int4",
    "bnb-int8": "int8-weights",
}
DEQUANTISED = (
    "gptq-3bits",
    "gptq-8bits",
    "gptq-actorder",
    "ct-int4-actorder",
    "ct-fp8-block",
    "bnb-nf4",
    "hqq-4bits-axis1",
)


def quantized_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, kernels.Quantized)}


def exact(layer) -> torch.Tensor:
    """(out, in) float64: what the bits mean, without a rounding."""
    if layer.kind != "int4":
        return layer.qweight.double() * layer.scale.double()[:, None]
    q = torch.stack((layer.qweight & 15, layer.qweight >> 4), -1).flatten(1).double()
    zero, scale = (t.double().repeat_interleave(32, 1) for t in (layer.zero, layer.scale))
    return ((q - zero) * scale)[:, : layer.in_features]


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("of", [PHI, PHI3], ids=str)
def test_the_bits_of_the_folder_are_those_of_the_layers(tmp_path, kind, of):
    """Rounded once to the packaging's dtype they are its own numbers, bit for bit."""
    if of not in packers.KINDS[kind].families:
        pytest.skip("not of this family")
    plain = packers.write(tmp_path / "folder", kind, of)
    model = weights.load(of.cls(), tmp_path / "folder", packed=True)
    layers = quantized_layers(model)
    assert len(layers) == 3 * (4 if of is PHI3 else 6)
    for name, layer in layers.items():
        assert layer.kind == HELD[kind]
        own = plain[f"{name}.weight"]
        if kind == "bnb-int8":
            torch.testing.assert_close(exact(layer).float(), own, rtol=3e-7, atol=0)
        else:
            assert torch.equal(exact(layer).to(own.dtype), own), name


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("of", [GPT_NEO, OPENAI_GPT, PHI, PHI3, PERSIMMON], ids=str)
def test_logits_are_those_of_the_exact_weights_within_the_noise_of_float32(tmp_path, kind, of):
    if of not in packers.KINDS[kind].families:
        pytest.skip("not of this family")
    packers.write(tmp_path / "folder", kind, of)
    model = weights.load(of.cls(), tmp_path / "folder", packed=True, dtype=torch.float32)
    layers = quantized_layers(model)
    assert layers
    twin = weights.load(of.cls(), tmp_path / "folder", dtype=torch.float64)
    for name, layer in layers.items():
        module, w = twin.get_submodule(name), exact(layer)
        module.weight.data = w.t().contiguous() if type(module).__name__ == "Conv1D" else w
    plain = copy.deepcopy(twin).float()
    ids, _ = inputs(101)
    for few in (ids, ids[:1, :1]):
        with torch.no_grad():
            truth = twin(few).logits
            noise = (plain(few).logits.double() - truth).norm()
            off = (model(few).logits.double() - truth).norm()
        assert off <= 3 * noise + 1e-7 * truth.norm()


@pytest.mark.parametrize("kind", DEQUANTISED)
def test_what_no_layer_can_hold_is_dequantised(tmp_path, kind):
    plain = packers.write(tmp_path / "folder", kind, PHI)
    model = weights.load(PHI.cls(), tmp_path / "folder", packed=True)
    assert not quantized_layers(model)
    name = "model.layers.0.mlp.fc1.weight"
    assert torch.equal(
        model.state_dict()[name],
        plain[name].to(model.dtype if hasattr(model, "dtype") else plain[name].dtype),
    )


def test_split_gate_and_up_become_one_layer(tmp_path):
    packers.write(tmp_path / "folder", "gptq-4bits", PHI3)
    whole = weights.load(PHI3.cls(), tmp_path / "folder", packed=True)
    split_gate_up(tmp_path / "folder")
    parts = weights.load(PHI3.cls(), tmp_path / "folder", packed=True)
    name = "model.layers.1.mlp.gate_up_proj"
    for buffer in ("qweight", "scale", "zero"):
        assert torch.equal(
            getattr(parts.get_submodule(name), buffer), getattr(whole.get_submodule(name), buffer)
        )


def split_gate_up(folder):
    """As newer tools write Phi-3: the fused matrix in two, by its outputs."""
    from safetensors.torch import load_file, save_file

    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".gate_up_proj." in name and not name.endswith("g_idx"):
            for half, part in zip(("gate_proj", "up_proj"), tensor.chunk(2, -1), strict=True):
                stored[name.replace("gate_up_proj", half)] = part.contiguous()
        elif ".gate_up_proj." in name:
            for half in ("gate_proj", "up_proj"):
                stored[name.replace("gate_up_proj", half)] = tensor.clone()
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_packed_model_is_saved_and_loaded_as_it_is(tmp_path):
    packers.write(tmp_path / "folder", "gptq-4bits", PHI)
    model = weights.load(PHI.cls(), tmp_path / "folder", packed=True)
    weights.save(model, tmp_path / "saved")
    again = weights.load(PHI.cls(), tmp_path / "saved")
    ids, _ = inputs(101)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_an_adapter_is_merged_into_numbers_and_not_into_bits(tmp_path):
    from tests.test_adapters import small_adapter

    packers.write(tmp_path / "folder", "gptq-4bits", PHI)
    adapter = small_adapter(tmp_path / "adapter")
    model = weights.load(PHI.cls(), tmp_path / "folder", packed=True, adapter=adapter)
    names = quantized_layers(model)
    assert "model.layers.0.self_attn.q_proj" not in names
    assert "model.layers.1.self_attn.q_proj" in names
