"""Products of many rows with 4-bit weights, whose activations are rounded to 8 bits as well (W4A8)."""

import json

import pytest
import torch

from decoders import kernels, phi, tokenize, weights
from decoders.cli import main
from decoders.kernels import int8_cache, native
from tests import packers
from tests.families import PHI, inputs

GROUP = 256  # numbers that share a scale
TINY = "checkpoints/tiny-phi"


@pytest.fixture(autouse=True)
def needs_the_kernels():
    if not native.wait():
        pytest.skip(f"the kernels are {native.status()}")
    with torch.no_grad():
        yield


def int4_layer(inputs: int, outputs: int, what: str) -> kernels.Quantized:
    """With zeros as `quantize` makes them, or with float minima and scattered inputs as files have them."""
    linear = torch.nn.Linear(inputs, outputs)
    if what == "zero":
        return kernels.Quantized.from_weight(linear, "int4", linear.weight).requires_grad_(False)
    shape = (outputs, inputs // 32)
    q = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scale, minimum = (torch.rand(shape) * 0.01).half(), -(torch.rand(shape) * 0.08).half()
    order = torch.randperm(inputs) if what == "scattered" else None
    pairs = q[:, ::2] | q[:, 1::2] << 4
    layer = kernels.Quantized.from_bits(linear, pairs, scale, None, minimum, order)
    assert layer.prefill == "exact"
    return kernels.set_prefill(layer, "int8").requires_grad_(False)


def rounded(t: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """To 127 steps on either side of 0."""
    step = torch.where(top > 0, top / 127, 1)
    return (t / step).round() * step


def formula(x: torch.Tensor, layer: kernels.Quantized) -> torch.Tensor:
    """In float64: groups of x by their own largest number, of w by the largest one that its scales allow."""
    order = layer._buffers.get("order")
    x = (x if order is None else x[:, order.long()]).double()
    w, y = layer.by_groups(torch.float32, slice(None)).double(), layer.bias.double()
    zero = layer._buffers.get("zero", layer._buffers.get("minimum")).double()
    scale = layer.scale.double()
    offset = -zero * scale if "zero" in layer._buffers else zero
    tops = torch.maximum(offset.abs(), (15 * scale + offset).abs())
    for start in range(0, x.shape[1], GROUP):
        part = slice(start, start + GROUP)
        of_w = tops[:, start // 32 : (start + GROUP) // 32].amax(1, keepdim=True)
        of_x = x[:, part].abs().amax(1, keepdim=True)
        y = y + rounded(x[:, part], of_x) @ rounded(w[:, part], of_w).t()
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", ["zero", "minimum", "scattered"])
@pytest.mark.parametrize("size", [(17, 96, 5), (40, 1056, 70), (18, 4224, 129)], ids=str)
def test_more_than_16_rows_compute_the_formula(size, what, dtype):
    rows, inputs, outputs = size
    layer, x = int4_layer(inputs, outputs, what), torch.randn(rows, inputs).to(dtype)
    x[3] = 0
    found, expected = layer(x).double(), formula(x, layer)
    bound = 4e-3 if dtype is torch.bfloat16 else 2e-3  # numbers between two steps may go either way
    assert (found - expected).norm() <= bound * expected.norm()
    exact = kernels.set_prefill(layer, "exact")(x).double()
    off = (found - exact).norm() / exact.norm()
    assert 1e-4 < off < 0.02  # a tenth of what 4 bits cost


def test_up_to_16_rows_are_left_as_they_are():
    """As a planned step leaves them."""
    layer, x = int4_layer(512, 30, "zero"), torch.randn(16, 512)
    found = layer(x)
    assert torch.equal(found, kernels.set_prefill(layer, "exact")(x))


def test_a_row_does_not_depend_on_its_neighbours():
    layer, x = int4_layer(1056, 70, "zero"), torch.randn(50, 1056)
    whole = layer(x)
    x[:9] = 1e4
    x[9] = torch.nan
    assert torch.equal(layer(x)[10:], whole[10:]) and layer(x)[9].isnan().all()
    assert torch.equal(layer(x[20:45]), whole[20:45])


def test_a_large_activation_costs_its_own_group_alone():
    """With one scale for a row, all others would be rounded to zero."""
    layer, x = int4_layer(1024, 70, "zero"), torch.randn(20, 1024)
    x[:, 5] = 1000.0
    exact = kernels.set_prefill(layer, "exact")(x)
    found = kernels.set_prefill(layer, "int8")(x)
    w = layer.dequantize()
    lost = x[:, :GROUP].clone()
    lost[:, 5] = 0
    assert (found - exact).norm() < 1.5 * (lost @ w[:, :GROUP].t()).norm() + 0.02 * exact.norm()
    rest = x.clone()
    rest[:, :GROUP] = 0
    a, b = layer(rest), kernels.set_prefill(layer, "exact")(rest)
    assert (a - b).norm() < 0.02 * b.norm()


def test_a_cached_text_equals_a_whole_one_up_to_8_bits(family):
    model = kernels.prepare(kernels.quantize(family.model(), "int4"))
    ids, _ = inputs(101)
    whole = model(ids).logits
    output = model(ids[:, :10], use_cache=True)
    parts = [output.logits]
    for n in range(10, ids.shape[1]):
        output = model(ids[:, n : n + 1], past_key_values=output.past_key_values)
        parts.append(output.logits)
    off = (torch.cat(parts, 1) - whole).norm() / whole.norm()
    assert 0 < off < 0.05


def test_it_is_chosen_when_a_model_is_made_loaded_or_prepared(family, tmp_path):
    model, (ids, _) = family.model(), inputs(101)
    both = {name: kernels.quantize(family.model(), "int4", prefill=name) for name in ("int8", "exact")}
    logits = {name: kernels.prepare(model)(ids).logits for name, model in both.items()}
    assert not torch.equal(logits["int8"], logits["exact"])
    assert torch.equal(kernels.prepare(kernels.quantize(model, "int4"))(ids).logits, logits["int8"])
    assert torch.equal(kernels.prepare(model, prefill="exact")(ids).logits, logits["exact"])
    for wrong in ("int4", "", 8):
        with pytest.raises(ValueError, match="prefill must be one of int8, exact, not"):
            kernels.prepare(model, prefill=wrong)


def test_the_loader_and_the_command_line_take_it(capsys, monkeypatch):
    ids = torch.tensor([tokenize.load(TINY).encode("Once upon a time there was a girl. " * 4)])
    loaded = {
        name: weights.load(phi.PhiForCausalLM, TINY, quantize="int4", prefill=name)(ids).logits
        for name in (None, "int8", "exact")
    }
    assert torch.equal(loaded[None], loaded["int8"]) and not torch.equal(loaded[None], loaded["exact"])
    rounded, own = [], kernels.Quantized.rounds_activations
    monkeypatch.setattr(
        kernels.Quantized,
        "rounds_activations",
        lambda layer, x: rounded.append(own(layer, x)) or rounded[-1],
    )
    command = ["generate", TINY, "Once upon a time there was a girl. " * 4, "--max-new-tokens", "2"]
    for name in ("int8", "exact"):
        rounded.clear()
        assert main([*command, "--quantize", "int4", "--prefill", name]) == 0
        assert capsys.readouterr().out.strip() and any(rounded) == (name == "int8")
    assert main([*command, "--prefill", "exact"]) == 0
    assert "no layer of this model has 4 bits" in capsys.readouterr().err
    assert main([*command, "--prefill", "exact", "--tensor-parallel"]) != 0
    assert "--tensor-parallel and --prefill exclude each other" in capsys.readouterr().err


def test_saving_keeps_it(family, tmp_path):
    ids, _ = inputs(101)
    for name in ("int8", "exact"):
        model = kernels.prepare(kernels.quantize(family.model(), "int4", prefill=name))
        weights.save(model, tmp_path / name)
        again = weights.load(family.cls(), tmp_path / name)
        assert torch.equal(again(ids).logits, model(ids).logits)
        weights.save(kernels.prepare(again, prefill="exact"), tmp_path / f"{name} again")
        exact = weights.load(family.cls(), tmp_path / f"{name} again")
        assert {m.prefill for m in exact.modules() if isinstance(m, kernels.Quantized)} == {"exact"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("mlx-4bits", "exact"), ("gptq-actorder-32", "exact"), ("ct-int4-channel", "exact"), (None, "int8")],
)
def test_a_folder_that_does_not_say_it_is_read_by_what_it_holds(kind, expected, tmp_path):
    """As those that were saved before it was written down: a packed file's bits are computed exactly."""
    if kind is None:
        model = kernels.quantize(PHI.model(), "int4")
    else:
        packers.write(tmp_path / "packed", kind, PHI)
        model = weights.load(PHI.cls(), tmp_path / "packed", packed=True)
    weights.save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"].pop("prefill") == expected
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    again = weights.load(PHI.cls(), tmp_path / "saved")
    layers = [m for m in again.modules() if isinstance(m, kernels.Quantized) and m.kind == "int4"]
    assert layers and {layer.prefill for layer in layers} == {expected}


def test_none_leaves_cache_and_prefill_as_they_were(family):
    model = kernels.prepare(kernels.quantize(family.model(), "int4"), cache="int8", prefill="exact")
    kernels.prepare(model, cache="int8")
    kernels.prepare(model, prefill="exact")
    kernels.prepare(model)
    assert {m.prefill for m in model.modules() if isinstance(m, kernels.Quantized)} == {"exact"}
    ids, _ = inputs(101)
    assert "Int8" in type(model(ids, use_cache=True).past_key_values).__name__


def test_it_costs_little_beside_4_bits():
    """The default of int4: the logits are hardly further from those of float32."""
    model = weights.load(phi.PhiForCausalLM, TINY, dtype=torch.float32)
    ids = torch.tensor([tokenize.load(TINY).encode("Once upon a time there was a girl. " * 8)])
    exact, int8 = (kernels.error(model, ids, "int4", prefill=name).logits for name in ("exact", "int8"))
    assert int8 < 1.1 * exact


def test_a_minimum_of_one_group_is_kept():
    """Of 8 bits."""
    linear, q = torch.nn.Linear(32, 5), torch.randint(-9, 9, (5, 32), dtype=torch.int8)
    ones = torch.ones(5, 1).half()
    layer = kernels.Quantized.from_bits(linear, q, ones, None, 3 * ones)
    assert layer is None or torch.equal(layer.dequantize(), q + 3.0)


def test_rows_of_8_bits_are_sliced_without_a_dimension():
    rows = int8_cache.Rows(int8_cache.quantize_rows(torch.randn(3, 2, 4, 8)), torch.float32)
    whole = rows.dequantize()
    for given in ({}, {"dim": 2, "start": 1}, {"dim": 3, "start": 2}, {"dim": -1, "end": 5}):
        sliced = torch.ops.aten.slice.Tensor(rows, **given)
        sliced = sliced.dequantize() if isinstance(sliced, int8_cache.Rows) else sliced
        assert torch.equal(sliced, torch.ops.aten.slice.Tensor(whole, **given))
