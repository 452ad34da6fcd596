"""Weights of 8 and 4 bits: what they stand for, that nothing else changes, and that they come back from a folder."""

import copy
import json
import pickle
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from decoders import decoding, fuyu, kernels, tokenize, weights
from decoders.cli import main
from decoders.formats.files import read_safetensors
from decoders.kernels import native
from decoders.kernels.quantized import matrix, whole_products
from tests.families import PADDED, inputs
from tests.folders import safetensors_whole, weights_of, write_config

KINDS = tuple(kernels.KINDS)
kinds = pytest.mark.parametrize("kind", KINDS)
SIZES = [
    (1, 32, 7),
    (1, 513, 9),
    (1, 1300, 70),
    (2, 45, 67),
    (3, 128, 64),
    (5, 130, 33),
    (9, 45, 67),
    (17, 200, 130),
    (49, 64, 65),
    (40, 4201, 70),
]  # rows, inputs, outputs


@pytest.fixture
def without_a_compiler(monkeypatch):
    monkeypatch.setenv("DECODERS_NATIVE", "0")
    monkeypatch.setattr(native, "STATE", native.State())


def layer(
    kind: str, inputs: int, outputs: int, dtype=torch.float32
) -> tuple[torch.nn.Linear, kernels.Quantized]:
    """A layer, and the same of `kind`, which leaves its inputs as they are."""
    linear = torch.nn.Linear(inputs, outputs).to(dtype)
    own = kernels.Quantized.from_weight(linear, kind, linear.weight).requires_grad_(False)
    return linear, kernels.set_prefill(own, "exact")


def wanted(x, layer):
    """The formula in float64."""
    x = x.double()
    if layer.kind == "int8":
        scale = (x.float().abs().amax(-1, keepdim=True) / 127).double()
        x = (x / torch.where(scale > 0, scale, 1)).float().round().double() * scale
    return x @ layer.dequantize().double().t() + layer.bias.double()


@pytest.fixture(params=["kernels.c", "PyTorch"])
def way(request):
    if request.param == "PyTorch":
        request.getfixturevalue("without_a_compiler")
    elif native.library() is None:
        pytest.skip("kernels.c cannot be compiled here")


# ---- One layer ---------------------------------------------------------------------------------------------


@torch.no_grad()
@kinds
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_layer_computes_its_formula(way, kind, size, dtype):
    rows, inputs, outputs = size
    _, own = layer(kind, inputs, outputs)
    x = torch.randn(rows, inputs).to(dtype)
    x[rows // 2] = 0
    found, expected = own(x), wanted(x, own)
    assert found.dtype == dtype and found.shape == (rows, outputs)
    bound = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 2e-6) * expected.abs().max()
    assert (found - expected).abs().max() <= bound


@torch.no_grad()
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_have_one_sign_lose_nothing(way, kind, dtype):
    """What the zeros of 4 bits take away is then large beside what stays."""
    _, own = layer(kind, 3000, 50)
    x = (1 + 0.01 * torch.randn(1, 3000)).to(dtype)
    bound = {torch.bfloat16: 4e-3, torch.float32: 2e-5}[dtype]
    expected = wanted(x, own)
    assert (own(x) - expected).abs().max() <= bound * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("largest", [1e-6, 1.0, 0.99999997, 2.0, 3e4, 1e-30, 1e30])
@pytest.mark.parametrize("rows", [1, 4])
def test_inputs_of_very_different_sizes_keep_24_bits(dtype, largest, rows):
    """Of the largest one, as float32 sums do: one number of a row may be thousands of times the others."""
    if native.library() is None:
        pytest.skip("kernels.c cannot be compiled here")
    if largest > torch.finfo(dtype).max or largest < torch.finfo(dtype).tiny:
        pytest.skip(f"{dtype} has no such number")
    _, own = layer("int8-weights", 1000, 33)
    own.bias.zero_()
    x = largest * torch.randn(rows, 1000).clamp(-1, 1) * torch.logspace(-6, 0, 1000)
    x[:, 77], x[0, 78] = largest, -largest
    x = x.to(dtype)
    expected = x.double() @ own.dequantize().double().t()
    bound = 2.0**-23 * x.abs().max() * own.dequantize().abs().sum(1) + torch.finfo(dtype).eps * expected.abs()
    assert ((own(x) - expected).abs() <= bound).all()


@torch.no_grad()
@kinds
def test_bits_are_as_near_as_they_can_be(kind):
    linear, own = layer(kind, 96, 40)
    off, step = (own.dequantize() - linear.weight).abs(), own.scale.float()
    if kind == "int4":
        assert (off.unflatten(1, (-1, 32)).amax(-1) <= 0.501 * step[:, :3]).all()
    else:
        assert (off.amax(1) <= 0.501 * step).all() and (own.qweight.abs().amax(1) == 127).all()


@torch.no_grad()
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_compiled_and_the_plain_way_give_the_same_bits(kind, dtype, monkeypatch):
    if native.library() is None:
        pytest.skip("kernels.c cannot be compiled here")
    weight = torch.randn(37, 150).to(dtype)
    weight[3], weight[4, :40], weight[5] = 0, 0, weight[5].abs()
    linear = torch.nn.Linear(150, 37)
    one = kernels.Quantized.from_weight(linear, kind, weight)
    monkeypatch.setattr(native, "library", lambda: None)
    for other in (weight, weight.t().contiguous().t()):
        two = kernels.Quantized.from_weight(linear, kind, other)
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))
        assert torch.equal(one.dequantize(dtype), two.dequantize(dtype))


@torch.no_grad()
@kinds
@pytest.mark.parametrize("rows", [1, 5, 60])
def test_what_is_no_number_stays_none(way, kind, rows):
    """The plain way rounds it to some whole number, and keeps it in the scale."""
    _, own = layer(kind, 70, 50)
    x = torch.randn(rows, 70)
    x[rows // 2, 33] = torch.nan
    found = own(x).isnan()
    assert found[rows // 2].all() and found.sum() == 50


@torch.no_grad()
@kinds
def test_a_row_does_not_depend_on_its_neighbours(way, kind):
    """FBGEMM's dynamic product has one scale for all rows: a cached text differed from an uncached one."""
    _, own = layer(kind, 70, 50)
    x = torch.randn(60, 70) * torch.logspace(-3, 3, 60)[:, None]
    together = own(x)
    for i in (0, 7, 59):
        bound = 0 if kind == "int8" else 1e-6 * together[i].abs().max()
        assert (own(x[i]) - together[i]).abs().max() <= bound
    assert torch.equal(own(x.view(3, 20, 70)), together.view(3, 20, 50)) and own(x[:0]).shape == (0, 50)


@kinds
def test_layers_are_moved_copied_and_pickled(kind):
    _, own = layer(kind, 70, 50)
    x = torch.randn(3, 70)
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own)), copy.deepcopy(own).half().float()):
        assert torch.equal(other.qweight, own.qweight) and torch.equal(other.scale, own.scale)
        torch.testing.assert_close(other(x), own(x), atol=1e-3, rtol=1e-3)
    _, fresh = layer(kind, 70, 50)
    fresh.load_state_dict(own.state_dict())
    assert torch.equal(fresh(x), own(x))
    assert own.to("meta").qweight.is_meta


@kinds
def test_training_is_an_error_with_a_sentence(kind, family):
    model = kernels.quantize(family.model(), kind)
    ids, _ = inputs(101)
    assert not any(p.requires_grad for p in model.parameters()) and model(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"{kind} cannot be trained: load the model without quantize"):
        model.train()
    with pytest.raises(ValueError, match="no gradient"):
        model(
            inputs_embeds=torch.randn(
                1, 3, model.get_submodule(family.table).embedding_dim, requires_grad=True
            )
        )


@kinds
def test_weights_that_are_no_numbers_are_named(kind):
    linear = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with torch.no_grad():
        linear[0].weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="0: weights that are NaN or infinite cannot be made"):
        kernels.Quantized.from_weight(linear[0], kind, linear[0].weight, name="0")


# ---- A model -----------------------------------------------------------------------------------------------


@torch.no_grad()
@kinds
def test_every_linear_layer_is_quantised_and_nothing_else(family, kind):
    plain = family.model()
    model = kernels.quantize(copy.deepcopy(plain), kind)
    for name, module in plain.named_modules():
        own = model.get_submodule(name)
        if type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D":
            assert isinstance(own, kernels.Quantized) and own.kind == kind, name
            weight = matrix(module, module.weight)
            assert (own.dequantize() - weight).abs().max() <= {"int4": 0.08}.get(
                kind, 0.005
            ) * weight.abs().max(), name
        else:
            assert type(own) is type(module), name
    cost = kernels.error(plain, inputs(101)[0], kind)
    assert 0 < cost.logits < {"int4": 0.5}.get(kind, 0.06) and cost.perplexity != cost.before > 1


@torch.no_grad()
@kinds
def test_a_cached_and_padded_text_equals_a_whole_one(family, kind):
    """In float32, where what enters a layer is the same to 1e-6: rounding it to 8 bits then rarely differs."""
    model = kernels.prepare(kernels.quantize(family.model(), kind, prefill="exact"))
    ids, mask = inputs(101, padded=True)
    whole = model(ids, attention_mask=mask).logits
    cache, parts = None, []
    for part in ids.split([PADDED + 2, 1, 1, ids.shape[1] - PADDED - 4], 1):
        seen = sum(p.shape[1] for p in parts) + part.shape[1]
        output = model(part, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    off = (torch.cat(parts, 1) - whole)[mask.bool()].abs() / whole.abs().max()
    assert off.median() < 1e-5 and off.max() < {"int8": 0.03}.get(kind, 2e-5)
    alone = model(ids[1:], attention_mask=mask[1:]).logits
    off = (alone - whole[1:]).abs() / whole.abs().max()
    assert off.median() < 1e-5 and off.max() < {"int8": 0.03}.get(kind, 2e-5)


@torch.no_grad()
@kinds
def test_generation_beams_and_assistants(family, kind):
    model = kernels.prepare(kernels.quantize(family.model(), kind))
    ids, _ = inputs(101)
    ids = ids[:1, :9]
    text, row = model.generate(ids, max_new_tokens=6, eos_token_id=None), ids
    for _ in range(6):
        row = torch.cat((row, model(row).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(text, row)
    more = {"max_new_tokens": 6, "eos_token_id": None}
    assert torch.equal(decoding.generate(model, ids, assistant_model=family.model(), **more), text)
    assert torch.equal(decoding.generate(model, ids, prompt_lookup_num_tokens=3, **more), text)
    assert decoding.generate(model, ids, num_beams=3, **more).shape == text.shape


@kinds
@pytest.mark.parametrize(
    "head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
def test_heads_are_quantised_too(family, kind, head):
    model = family.model(head, num_labels=3, pad_token_id=0)
    ids, _ = inputs(101)
    exact = model(ids)[1]
    found = kernels.quantize(model, kind)(ids)[1]
    assert 0 < (found - exact).norm() / exact.norm() < 0.5


@kinds
def test_pictures_are_seen(kind):
    tiny = "checkpoints/tiny-fuyu"
    model, tokenizer = weights.load(fuyu.FuyuForCausalLM, tiny, quantize=kind), tokenize.load(tiny)
    processor = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer)
    inputs = processor(["Generate a coco-style caption.\n"], [Image.open(f"{tiny}/shapes.png")])
    new = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == "a red circle left of a blue square"


def test_skipped_layers_stay(family):
    model = kernels.quantize(family.model(), "int4", skip=[family.output.rpartition(".")[2]])
    assert type(model.get_submodule(family.output)) is torch.nn.Linear
    name = next(name for name, m in model.named_modules() if isinstance(m, kernels.Quantized))
    other = kernels.quantize(family.model(), "int4", skip=[name])
    assert not isinstance(other.get_submodule(name), kernels.Quantized)
    for wrong, shown in ((["nothing"], "no linear layer is called nothing"),):
        with pytest.raises(ValueError, match=shown):
            kernels.quantize(family.model(), "int4", skip=wrong)
    with pytest.raises(ValueError, match="quantised already"):
        kernels.quantize(other, "int8")
    with pytest.raises(ValueError, match="one of int8, int8-weights, int4, not 'int3'"):
        kernels.quantize(family.model(), "int3")
    with pytest.raises(ValueError, match="resize it before"):
        weights.resize_embeddings(other, 110)


def test_a_compiler_or_an_export_gets_plain_operations(family):
    """Which round no activations."""
    model = kernels.quantize(family.model(), "int4", prefill="exact")
    ids, _ = inputs(101)
    with torch.no_grad():
        exported = torch.export.export(model, (ids,), {"use_cache": False}).module()
        torch.testing.assert_close(
            exported(ids, use_cache=False).logits, model(ids).logits, atol=1e-4, rtol=1e-4
        )


def test_without_a_compiler_it_is_said_once(without_a_compiler):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(2):
            linear = torch.nn.Sequential(torch.nn.Linear(8, 8))
            linear.config_json = {}
            kernels.quantize(linear, "int8")
    assert [str(one.message).rpartition(": ")[2] for one in shown] == [
        "weights of 8 and 4 bits save memory, but not time"
    ]


# ---- Folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(family, tmp_path):
    safetensors_whole(write_config(tmp_path / "plain", family), weights_of(family))
    return tmp_path / "plain"


@torch.no_grad()
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_folder_is_the_model_bit_for_bit(family, folder, kind, dtype, tmp_path):
    model = weights.load(family.cls(), folder, quantize=kind, dtype=dtype)
    ids, _ = inputs(101)
    assert model.get_submodule(family.table).weight.dtype == dtype
    same = kernels.quantize(weights.load(family.cls(), folder, dtype=torch.float32), kind)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), same.buffers(), strict=True))
    weights.save(model, tmp_path / "small")
    shown = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    prefill = {"prefill": "int8"} if kind == "int4" else {}
    assert shown == {"quant_method": "decoders", "version": 1, "weights": kind, **prefill}
    again = weights.load(family.cls(), tmp_path / "small")
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        n: t.dtype for n, t in model.state_dict().items()
    }
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="small: the model is quantised already"):
        weights.load(family.cls(), tmp_path / "small", quantize="int8")


def test_skipped_layers_are_skipped_when_loading(family, folder, tmp_path):
    weights.save(weights.load(family.cls(), folder, quantize="int8", skip=["lm_head"]), tmp_path / "small")
    again = weights.load(family.cls(), tmp_path / "small")
    assert type(again.get_submodule(family.output)) is torch.nn.Linear and kernels.is_quantized(again)
    assert kernels.is_quantized(weights.load(family.cls("Model"), tmp_path / "small"))


@torch.no_grad()
@kinds
@pytest.mark.parametrize(
    "head", ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
def test_a_quantised_folder_goes_into_the_other_classes(family, folder, kind, head, tmp_path):
    """A head that the folder does not have is drawn anew, in 16 or 32 bits; its trunk is that of the folder."""
    weights.save(weights.load(family.cls(), folder, quantize=kind), tmp_path / "small")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        model = weights.load(family.cls(head), tmp_path / "small")
    assert [bool(re.search("has no .*: drawn anew", str(one.message))) for one in shown] == [True] * (
        head != "Model"
    )
    causal = weights.load(family.cls(), tmp_path / "small")
    ids = inputs(101)[0][:1]
    trunk = model if head == "Model" else getattr(model, family.base)
    assert torch.equal(trunk(ids)[0], getattr(causal, family.base)(ids)[0])
    weights.save(model, tmp_path / "head")
    again = weights.load(family.cls(head), tmp_path / "head")
    assert all(
        torch.equal(a, b)
        for a, b in zip(again(ids)[:2], model(ids)[:2], strict=True)
        if isinstance(a, torch.Tensor)
    )


@pytest.mark.parametrize(("change", "shown"), [
    (lambda c: c.update(version=2), "quantised in version 2, and this reads 1: quantise it again"),
    (lambda c: c.update(weights="int3"), "one of int8, int8-weights, int4, not 'int3'"),
    (lambda c: c.update(quant_method="gptq"), "model.safetensors: .* has no scales"),
    (lambda c: c.update(quant_method="eetq"), "quant_method 'eetq' is not supported"),
    (lambda c: c.update(weights="int8"), "unexpected: .*zero"),
])  # fmt: skip
def test_a_config_that_tells_something_else(folder, family, tmp_path, change, shown):
    weights.save(weights.load(family.cls(), folder, quantize="int4"), tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=shown):
        weights.load(family.cls(), tmp_path / "small")


@pytest.mark.parametrize(("name", "change", "shown"), [
    ("qweight", lambda t: t[:, :-1].clone(), r"is \(\d+, \d+\) in model.safetensors, not"),
    ("qweight", lambda t: t.float(), "is torch.float32 in model.safetensors, not torch.uint8"),
    ("scale", lambda t: t.float(), "is torch.float32 in model.safetensors, not torch.float16"),
    ("zero", None, r"missing: .*zero"),
])  # fmt: skip
def test_bits_of_another_shape_or_type_are_told(folder, family, tmp_path, name, change, shown):
    """Else the compiled product would read behind their end."""
    weights.save(weights.load(family.cls(), folder, quantize="int4"), tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    state = load_file(file)
    stored = next(n for n in state if re.search(rf"\.\d\..*{name}$", n))  # of a layer
    state[stored] = state[stored] if change is None else change(state[stored])
    save_file({n: t for n, t in state.items() if change or n != stored}, file)
    for cls in {family.cls(), getattr(family.module, family.class_name("Model"), family.cls())}:
        with pytest.raises(ValueError, match=shown):
            weights.load(cls, tmp_path / "small")


PEAK = """
import sys, torch
from decoders import gpt_neo, weights
def held(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
torch.set_num_threads(1)
weights.load(gpt_neo.GPTNeoForCausalLM, sys.argv[2], quantize="int8")  # what is needed once
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = held("VmRSS")
model = weights.load(gpt_neo.GPTNeoForCausalLM, sys.argv[1], quantize="int8")
print(held("VmHWM") - before, sum(t.nbytes for t in model.buffers()))
"""


def test_memory_while_loading_is_that_of_the_bits_and_one_layer(tmp_path):
    from decoders import gpt_neo

    sizes = {"hidden_size": 768, "num_layers": 6, "num_heads": 12, "vocab_size": 300, "max_position_embeddings": 64,
             "attention_types": [[["global", "local"], 3]]}  # fmt: skip
    for name, changes in (
        ("large", {}),
        ("small", {"hidden_size": 24, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    ):
        model = gpt_neo.GPTNeoForCausalLM(gpt_neo.GPTNeoConfig(**{**sizes, **changes}))
        weights.save(model, tmp_path / name)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "large", tmp_path / "small"], capture_output=True, text=True
    )
    assert not result.returncode, result.stderr
    peak, bits = map(int, result.stdout.split())
    layer = 4 * 768 * 768 * 4
    assert bits > 40e6 and peak < bits + 2 * layer, (peak, bits)  # in float32 it was four times as much


@kinds
def test_the_command_line(family, folder, capsys, kind, tmp_path):
    if family.name != "gpt_neo":
        pytest.skip("once is enough")
    tiny = "checkpoints/tiny-gpt-neo"
    assert main(["generate", tiny, "Once upon a time", "--quantize", kind, "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")
    weights.save(weights.load(family.cls(), tiny, quantize=kind), tmp_path / "bits")
    assert main(["inspect", str(tmp_path / "bits"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["inspect", tiny, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert facts["quantized"] == kind and facts["memory"] < 0.8 * plain["memory"] and not facts["problems"]
    assert (
        facts["dtype"] == plain["dtype"]
        and len(read_safetensors(tmp_path / "bits" / "model.safetensors")) > 10
    )


def test_the_command_line_offers_every_kind(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "{" + ",".join(KINDS) + "}" in capsys.readouterr().out.replace("\n", "").replace(" ", "")


def test_the_documentation_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "speed.md").read_text()
    for row in re.findall(r"^\| `([\w-]+)` \|", page, re.M):
        assert row in KINDS
    (tmp_path / "checkpoints").symlink_to(Path(__file__).parents[1] / "checkpoints")
    monkeypatch.chdir(tmp_path)
    for command in re.findall(r"^python -m decoders (.*)$", page, re.M):
        assert main(shlex.split(command)) == 0
    quantized, *others = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(quantized, names := {})
    assert names["model"].model.layers[0].mlp.fc1.kind == "int4"
    for code in others:
        exec(code, names)


def test_products_of_whole_numbers_are_exact_under_autocast_too():
    q, w = torch.randint(-127, 128, (3, 3000)).float(), torch.randint(-127, 128, (5, 3000), dtype=torch.int8)
    right = q.double() @ w.double().t()
    assert torch.equal(whole_products(q, w), right)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole_products(q, w), right)
