"""`load(..., packed=True)`: layers of the very bits that a packaging stores, and the same logits."""

import contextlib
import copy
import json
import os
from pathlib import Path

import pytest
import torch

from decoders import kernels, model_class, read_config, weights
from decoders.cli import main
from decoders.kernels import native, step, texts
from tests import packers
from tests.families import GPT_NEO, OPENAI_GPT, PERSIMMON, PHI, PHI3, inputs

HELD = {  # kind of folder -> kind of layer
    "gptq-4bits": "int4",
    "gptq-symmetric": "int4",
    "gptq-v2": "int4",
    "gptq-without-index": "int4",
    "gptq-8bits": "int8-groups",
    "gptq-8bits-symmetric": "int8-groups",
    "gptq-actorder-32": "int4",
    "gptq-actorder-64-8bits": "int8-groups",
    "awq": "int4",
    "mlx-4bits": "int4",
    "mlx-float16": "int4",
    "ct-int4": "int4",
    "ct-int4-channel": "int4",
    "ct-int4-asymmetric": "int4",
    "ct-int4-actorder": "int4",
    "ct-int8": "int8-groups",
    "ct-int8-plain": "int8-weights",
    "ct-int8-asymmetric": "int8-groups",
    "torchao-int4": "int4",
    "bnb-int8": "int8-weights",
}
DEQUANTISED = (
    "gptq-3bits",
    "gptq-actorder",  # whose groups have 16 inputs
    "mlx-8bits",
    "ct-fp8-block",
    "bnb-nf4",
    "hqq-4bits-axis1",
)


def quantized_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, kernels.Quantized)}


def exact(layer) -> torch.Tensor:
    """(out, in) float64: what the bits mean, without a rounding."""
    tensors = dict(layer.named_buffers())
    q, scale = tensors["qweight"].double(), tensors["scale"].double()
    if scale.dim() == 1:
        return q * scale[:, None]
    if layer.kind == "int4":
        q = torch.stack((layer.qweight & 15, layer.qweight >> 4), -1).flatten(1).double()
    scale, zero, minimum = (by_inputs(layer, name) for name in ("scale", "zero", "minimum"))
    w = (q[:, : layer.in_features] - zero) * scale + minimum
    return w[:, tensors["order"].long().argsort()] if "order" in tensors else w


def by_inputs(layer, name) -> torch.Tensor:
    """(out, in) float64 of what each group has one of."""
    table = dict(layer.named_buffers()).get(name, torch.zeros_like(layer.scale)).double()
    inputs = layer.in_features if layer.kind == "int8-groups" else -(-layer.in_features // 128) * 128
    group = 32
    while -(-inputs // group) > table.shape[1]:
        group *= 2
    return table.repeat_interleave(group, 1)[:, : layer.in_features]


def rounded_twice(layer, dtype) -> torch.Tensor:
    """As MLX computes its weights: each product and each sum rounded."""
    offset = by_inputs(layer, "minimum")
    return ((exact(layer) - offset).to(dtype).double() + offset).to(dtype)


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("of", [PHI, PHI3], ids=str)
def test_the_bits_of_the_folder_are_those_of_the_layers(tmp_path, kind, of):
    """Rounded once to the packaging's dtype they are its own numbers, bit for bit."""
    if of not in packers.KINDS[kind].families:
        pytest.skip("not of this family")
    plain = packers.write(tmp_path / "folder", kind, of)
    model = weights.load(of.cls(), tmp_path / "folder", packed=True)
    layers = quantized_layers(model)
    has_embedding = kind.startswith("mlx")  # and output layer
    assert len(layers) == 3 * (4 if of is PHI3 else 6) + 2 * has_embedding
    for name, layer in layers.items():
        assert layer.kind == HELD[kind]
        own = plain[f"{name.removesuffix('.table')}.weight"]
        if kind == "bnb-int8":
            torch.testing.assert_close(exact(layer).float(), own, rtol=3e-7, atol=0)
        elif kind.startswith("mlx"):
            assert torch.equal(rounded_twice(layer, own.dtype), own), name
        else:
            assert torch.equal(exact(layer).to(own.dtype), own), name
        assert torch.equal(layer.dequantize(torch.float32), exact(layer).float()), name


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
        module, w = twin.get_submodule(name.removesuffix(".table")), exact(layer)
        module.weight.data = w.t().contiguous() if type(module).__name__ == "Conv1D" else w
    plain = copy.deepcopy(twin).float()
    ids, _ = inputs(101)
    for few in (ids[:1, :14].repeat(1, 2), ids, ids[:1, :1]):  # 28 tokens, 46 and 1
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


@pytest.mark.parametrize("kind", [*DEQUANTISED, "gptq-4bits"])
def test_inspect_says_of_what_is_dequantised_that_it_is(tmp_path, kind, capsys):
    packers.write(tmp_path / "folder", kind, PHI)
    layers = quantized_layers(weights.load(PHI.cls(), tmp_path / "folder", packed=True))
    assert main(["inspect", str(tmp_path / "folder"), "--json"]) == 0
    assert bool(json.loads(capsys.readouterr().out)["runs packed"]) == bool(layers)
    assert main(["inspect", str(tmp_path / "folder")]) == 0
    assert (", runs packed" in capsys.readouterr().out) == bool(layers)


SAMPLES = Path(os.environ.get("DECODERS_TEST_DATA", "/nowhere")) / "packed"


def sizes_of_inspect(folder, capsys) -> list[int]:
    """Bytes of the weights: dequantised, and as they run packed."""
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    return [facts["memory"], facts.get("memory packed", facts["memory"])]


def bytes_held(folder, packed: bool) -> int:
    """Of all tensors of the loaded model, each counted once."""
    model = weights.load(model_class(read_config(folder)), folder, packed=packed)
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


@pytest.mark.parametrize("name", [p.name for p in sorted(SAMPLES.glob("*")) if p.name[:4] != "peft"])
def test_inspect_says_the_bytes_that_loading_takes(name, capsys):
    """It counted what runs packed as if it were dequantised: eight times too much of 4 bits."""
    folder = SAMPLES / name
    assert sizes_of_inspect(folder, capsys) == [bytes_held(folder, packed) for packed in (False, True)]


@pytest.mark.parametrize("kind", [*HELD, *DEQUANTISED])
def test_inspect_says_the_bytes_of_every_packaging(tmp_path, kind, capsys):
    packers.write(tmp_path / "folder", kind, PHI3 if PHI3 in packers.KINDS[kind].families else PHI)
    folder = tmp_path / "folder"
    assert sizes_of_inspect(folder, capsys) == [bytes_held(folder, packed) for packed in (False, True)]


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


@pytest.mark.parametrize("kind", HELD)
def test_a_packed_model_is_saved_and_loaded_as_it_is(tmp_path, kind):
    packers.write(tmp_path / "folder", kind, PHI)
    model = weights.load(PHI.cls(), tmp_path / "folder", packed=True)
    weights.save(model, tmp_path / "saved")
    again = weights.load(PHI.cls(), tmp_path / "saved")
    ids, _ = inputs(101)
    assert torch.equal(model(ids).logits, again(ids).logits)
    state = model.state_dict()
    assert all(
        torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in again.state_dict().items()
    )


def test_an_adapter_is_merged_into_numbers_and_not_into_bits(tmp_path):
    from tests.test_adapters import small_adapter

    packers.write(tmp_path / "folder", "gptq-4bits", PHI)
    adapter = small_adapter(tmp_path / "adapter")
    model = weights.load(PHI.cls(), tmp_path / "folder", packed=True, adapter=adapter)
    names = quantized_layers(model)
    assert "model.layers.0.self_attn.q_proj" not in names
    assert "model.layers.1.self_attn.q_proj" in names


@pytest.mark.parametrize("kind", [kind for kind in HELD if kind not in ("bnb-int8", "ct-int8-plain")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_of_packed_layers_are_planned_and_equal_the_modules(tmp_path, kind, dtype, monkeypatch):
    """Groups of any size, float minima, scattered inputs and packed embeddings too."""
    if not native.wait():
        pytest.skip(f"the kernels are {native.status()}")
    packers.write(tmp_path / "folder", kind, PHI)
    model = weights.load(PHI.cls(), tmp_path / "folder", packed=True, dtype=dtype)
    ids, _ = inputs(101)
    with torch.no_grad():
        results = []
        for planned in (True, False):
            if not planned:
                monkeypatch.setattr(texts, "step", lambda *args: None)
            cache, logits = None, []
            for n in range(3, 9):
                part = ids[:, :3] if n == 3 else ids[:, n - 1 : n]
                output = model(part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits[:, -1].double())
            results.append(torch.stack(logits))
    assert step.planned(model) == "planned"
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (results[0] - results[1]).norm() <= bound * results[1].norm()


def test_an_id_that_a_packed_embedding_has_not_is_refused(tmp_path):
    packers.write(tmp_path / "folder", "mlx-4bits", PHI)
    model = weights.load(PHI.cls(), tmp_path / "folder", packed=True)
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    for wrong in (-1, 101):
        for given in (None, cache):
            with pytest.raises(ValueError, match="input_ids must be int64 or int32, from 0 to 100"):
                model(torch.tensor([[wrong]]), past_key_values=given)


@pytest.mark.parametrize("group", [32, 64, 96, 128, 384, 1056])
@pytest.mark.parametrize("what", ["zero", "minimum", "int8", "int8 with a zero", "scattered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_groups_of_any_size_multiply_as_they_dequantize(group, what, dtype):
    """Of odd widths too: rows that are no multiple of what the kernels take at a time."""
    inputs, outputs = max(group * 3, 1056) // group * group, 37
    draw = torch.Generator().manual_seed(group)
    shape = (outputs, inputs // group)
    scale = (torch.rand(shape, generator=draw) * 0.01).to(torch.bfloat16 if group == 64 else torch.float16)
    zero = torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8)
    q = torch.randint(0, 16, (outputs, inputs), generator=draw, dtype=torch.uint8)
    minimum = order = None
    if what == "minimum":
        zero, minimum = None, torch.randn(shape, generator=draw).to(torch.bfloat16)
    if what.startswith("int8"):
        q = torch.randint(-128, 128, (outputs, inputs), generator=draw, dtype=torch.int8)
        zero = (zero * 16).view(torch.int8) if what.endswith("zero") else None
    if what == "scattered":
        order = torch.randperm(inputs, generator=draw)
    linear = torch.nn.Linear(inputs, outputs)
    stored = q if q.dtype == torch.int8 else q[:, ::2] | q[:, 1::2] << 4
    layer = kernels.Quantized.from_bits(linear, stored, scale, zero, minimum, order).requires_grad_(False)
    kernels.set_prefill(layer, "exact")
    spread = [None if t is None else t.double().repeat_interleave(group, 1) for t in (scale, zero, minimum)]
    w = (q.double() - (0 if zero is None else spread[1])) * spread[0] + (0 if minimum is None else spread[2])
    w = w if order is None else w[:, order.argsort()]
    assert torch.equal(layer.dequantize(), w.float())
    with torch.no_grad(), native.without():
        assert torch.equal(layer.dequantize(), w.float())
    of_group = sum(t[0, :1].nbytes for t in (layer.scale, zero, minimum) if t is not None)
    padded = -(-inputs // 128) * 128 if layer.kind == "int4" else inputs
    in_all = padded * outputs // (2 if layer.kind == "int4" else 1)
    in_all += outputs * -(-padded // (group & -group)) * of_group + (0 if order is None else 4 * inputs)
    assert sum(t.nbytes for t in layer.buffers()) == in_all  # a scale is not kept more often than needed
    for rows in (1, 2, 5, 6, 7, 33, 40):
        x = torch.randn(rows, inputs, generator=draw).to(dtype)
        right = x.double() @ w.t() + layer.bias.double()
        own = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        for way in (contextlib.nullcontext, native.without):
            with torch.no_grad(), way():
                off = (layer(x).double() - right).norm()
            assert off < own * right.norm(), (rows, way)
