"""A model taken apart: every value as the formula has it, every replacement as the formula goes on from it."""

import math

import pytest
import torch
from safetensors.torch import load_file

from decoders import hf, kernels
from decoders.compare.formula import Formula, stages
from decoders.look import attribution, traces
from tests.families import FAMILIES, OPENAI_GPT, PERSIMMON, PHI, PHI3, inputs

EXACT = {"atol": 1e-9, "rtol": 1e-9, "equal_nan": True}


def cases(family) -> dict[str, dict]:
    """Arguments besides the ids."""
    _, mask = inputs(101, padded=True)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    right = torch.ones_like(mask)
    right[1, -4:] = 0
    return {
        "plain": {},
        "left": {"attention_mask": mask, "position_ids": places},
        "right": {"attention_mask": right},
    }


def formula_of(model, ids, given, **options):
    return stages(model.config, model.state_dict(), {"input_ids": ids, **given}, **options)


@pytest.mark.parametrize("case", ["plain", "left", "right"])
def test_every_stage_is_the_formulas(family, case):
    model, (ids, _), given = family.model(dtype=torch.float64), inputs(101), cases(family)[case]
    found = traces.trace(model, ids, **given)
    expected = formula_of(model, ids, given)
    assert list(found) == list(expected) and set(found) == traces.names_of(Formula(model.config, {}))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}", **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_those_of_the_plain_pass(family, dtype):
    """Bit for bit, also of a prepared model, and the model is afterwards what it was before."""
    ids, _ = inputs(101)
    for model in (family.model(dtype=dtype), kernels.prepare(family.model(dtype=dtype))):
        for given in cases(family).values():
            before = model(ids, **given).logits
            assert torch.equal(traces.trace(model, ids, **given)["logits"], before)
            assert torch.equal(model(ids, **given).logits, before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_trace_of_a_decoding_step(family):
    """Cached keys are read, also where a step reads its window only, and the cache stays as it is."""
    model, (ids, _) = family.model(dtype=torch.float64), inputs(101)
    for past in (9, 22):
        cache = model(ids[:, :past]).past_key_values
        found = traces.trace(model, ids[:, past:], past_key_values=cache)
        whole = traces.trace(model, ids)
        assert len(cache) == past
        for name, value in found.items():
            along = 2 if value.dim() == 4 else 1
            expected = whole[name].narrow(along, past, 23 - past)
            if name.endswith((".scores", ".weights")):
                expected = expected[..., -value.shape[-1] :]
            torch.testing.assert_close(value, expected, **EXACT)


def test_a_replaced_value_goes_on_as_in_the_formula(family):
    """Each stage in turn, turned round: whoever reads it reads the new one, and nobody else does."""
    model, (ids, _) = family.model(dtype=torch.float64), inputs(101)
    found = traces.trace(model, ids)
    for name in found:

        def change(value, name=name):
            return value.flip(1) if "logits" not in name else value + 1

        expected = formula_of(model, ids, {}, note=lambda n, v, name=name: change(v) if n == name else None)
        patched = found.patch({name: change})
        torch.testing.assert_close(
            patched["logits"],
            change(expected["logits"]) if name == "logits" else expected["logits"],
            msg=lambda m, n=name: f"{n}: {m}",
            **EXACT,
        )
        assert torch.equal(patched[name], change(found[name])) or name.endswith("scores")
        assert not torch.equal(patched["logits"], found["logits"])


def test_patching_from_another_text(family):
    """The whole sum of a layer out of another text gives that text's logits; one position's, one position's."""
    model, (ids, _) = family.model(), inputs(101)
    clean, other = traces.trace(model, ids), traces.trace(model, ids.flip(0))
    moved = other.patch({"layers.1.out": clean["layers.1.out"]})
    torch.testing.assert_close(moved["logits"], clean["logits"], atol=2e-5, rtol=0)
    one = other.patch({"layers.1.out": clean["layers.1.out"]}, positions=[7])
    torch.testing.assert_close(one["logits"][:, :7], other["logits"][:, :7], atol=2e-5, rtol=0)
    assert torch.equal(one["layers.1.out"][:, 7], clean["layers.1.out"][:, 7])
    assert not torch.equal(one["logits"][:, 9], other["logits"][:, 9])
    head = other.patch({"layers.0.q": clean["layers.0.q"]}, positions=[5])
    assert torch.equal(head["layers.0.q"][:, :, 5], clean["layers.0.q"][:, :, 5])
    assert torch.equal(head["layers.0.q"][:, :, 6], other["layers.0.q"][:, :, 6])
    again = one.patch({"layers.2.mlp_out": 0.0})
    assert (
        torch.equal(again["layers.1.out"][:, 7], clean["layers.1.out"][:, 7])
        and not again["layers.2.mlp_out"].any()
    )


def test_a_text_in_another_length_cannot_be_exchanged(family):
    model, (ids, _) = family.model(), inputs(101)
    short = traces.trace(model, ids[:, :9])
    with pytest.raises(ValueError, match=r"layers.0.out has the shape \(2, 23, 48\), not \(2, 9, 48\)"):
        traces.trace(model, ids).patch({"layers.0.out": short["layers.0.out"]})


def test_ablation(family):
    model, (ids, _) = family.model(dtype=torch.float64), inputs(101)
    found = traces.trace(model, ids)
    without = found.patch(ablate=[(1, 2)])
    f = found.f
    torch.testing.assert_close(
        without["layers.1.attn_out"], found["layers.1.attn_out"] - found.by_head(1)[:, 2], **EXACT
    )
    mean = found.patch(ablate=[(1, 2)], by="mean")["layers.1.heads"][..., 2 * f.D : 3 * f.D]
    assert torch.equal(
        mean, found["layers.1.heads"][..., 2 * f.D : 3 * f.D].mean(1, keepdim=True).expand_as(mean)
    )
    gone = found.patch(ablate=1)
    if family is not OPENAI_GPT:  # whose norms are behind the sums
        torch.testing.assert_close(gone["layers.1.out"], found["layers.0.out"], **EXACT)
    assert torch.equal(gone["layers.0.out"], found["layers.0.out"])
    assert torch.equal(
        found.patch(ablate="layers.2.mlp_out")["layers.2.mlp_out"],
        torch.zeros_like(found["layers.2.mlp_out"]),
    )
    for wrong in (3, (0, 4), (-1, 0), -1):
        with pytest.raises(ValueError, match="ablate: there is no .*: layers are 0 to 2, heads 0 to 3"):
            found.patch(ablate=[wrong])
    with pytest.raises(ValueError, match='by must be "zero" or "mean", not \'nothing\''):
        found.patch(ablate=1, by="nothing")


@pytest.mark.parametrize("case", ["plain", "left"])
def test_contributions_sum_to_the_logit(family, case):
    """In float64 nothing is left over; each part is what its absence would take away, the norms' sizes kept."""
    model, (ids, _) = family.model(dtype=torch.float64), inputs(101)
    found = traces.trace(model, ids, **cases(family)[case])
    tokens = ids.roll(-1, 1)
    shown = found.attribution(tokens)
    assert shown.names[0] == "embeddings" and shown.names[-2:] == ["biases", "rounding"]
    assert len(shown.names) == 3 + 3 * (found.f.H + 1)
    assert torch.equal(shown.logits, found["logits"].gather(-1, tokens[..., None])[..., 0])
    torch.testing.assert_close(shown.values.sum(0), shown.logits, **EXACT)
    assert shown.values[-1].abs().max() < 1e-10
    assert shown.values[:-1].flatten(1).abs().amax(1)[:-1].min() > 1e-3


def test_what_the_last_layer_adds_is_linear_in_it(family):
    """Without the final norm's size the attribution of the last MLP is the change of the logit when it goes."""
    model, (ids, _) = family.model(dtype=torch.float64), inputs(101)
    found = traces.trace(model, ids)
    shown = found.attribution(7)
    f, u = found.f, attribution.matrix_of(model.get_submodule(found.f.module("head")))[7]
    name = f.module("norm") if "norm" in f.parts else f.module("norm_2", 2)
    x = found["layers.2.out"] if "norm" in f.parts else found["layers.2.mlp_in"] + found["layers.2.mlp_out"]
    norm, part = model.get_submodule(name), found["layers.2.mlp_out"]
    if isinstance(norm, torch.nn.LayerNorm):
        part = (part - part.mean(-1, keepdim=True)) / (
            x.var(-1, unbiased=False, keepdim=True) + norm.eps
        ).sqrt()
    else:
        part = part / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    expected = (part * norm.weight) @ u
    torch.testing.assert_close(shown.values[shown.names.index("layers.2.mlp_out")], expected, **EXACT)


@torch.no_grad()
def test_the_lens_ends_in_the_logits(family):
    model, (ids, _) = family.model(), inputs(101)
    found = traces.trace(model, ids)
    assert torch.equal(found.lens(3), found["logits"])
    assert torch.equal(
        found.lens(0), model.get_submodule(found.f.module("head"))(found.norm_of(found["embeddings"]))
    )


def test_attention_in_numbers():
    """On weights that are known: each head reads one place."""
    model, ids = PHI.model(), torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8]])
    found = traces.trace(model, ids)
    T = torch.arange(8)
    known = torch.zeros(1, 4, 8, 8)
    known[0, 0, T, T] = 1  # itself
    known[0, 1, T, (T - 1).clamp(min=0)] = 1  # the one before
    known[0, 2, T, torch.tensor([0, 0, 0, 0, 1, 2, 3, 4])] = 1  # what followed the earlier one
    known[0, 3] = torch.ones(8, 8).tril() / (T[:, None] + 1)  # all alike
    found = found.patch({f"layers.{i}.weights": known for i in range(3)})
    shown = {name: value[1].tolist() for name, value in found.heads().items()}
    assert shown["itself"][0] == shown["previous"][1] == shown["induction"][2] == 1
    assert shown["first"][2] == pytest.approx(3 / 7) and shown["entropy"][:3] == [0, 0, 0]
    assert shown["entropy"][3] == pytest.approx(sum(math.log2(n) for n in range(2, 9)) / 7)
    assert shown["distance"][:2] == [0, 1] and shown["distance"][3] == pytest.approx(
        sum((n - 1) / 2 for n in range(2, 9)) / 7
    )
    assert shown["induction"][3] == pytest.approx(sum(1 / n for n in (5, 6, 7, 8)) / 4)
    assert traces.induction(model, 12).shape == (3, 4)


def test_local_layers_read_their_window():
    """GPT-Neo's local layers see 5 tokens here, Phi-3's all."""
    family = next(f for f in FAMILIES if f.name == "gpt_neo")
    model, (ids, _) = family.model(), inputs(101)
    weights = traces.trace(model, ids)["layers.1.weights"]
    assert (weights > 0).sum(-1).max() == 5 and traces.trace(model, ids)["layers.0.weights"][:, :, -1].gt(
        0
    ).all()


def test_where_float16_ends():
    """As phi-2: every value fits, but the products of q and k do not; and a squared ReLU that does not fit."""
    model, (ids, _) = PHI.model(), inputs(101)
    for part in ("q_proj", "k_proj"):
        getattr(model.model.layers[1].self_attn, part).weight.data *= 150
    found = traces.trace(model, ids)
    row = found.overflow()
    assert row.stage == "layers.1.products" and row.largest > 65504
    assert max(m.largest for m in found.magnitudes() if not m.stage.endswith(".products")) < 65504
    assert "float16" in found.safe() and "bfloat16 and float32 hold it" in found.safe()
    exact = (
        found["layers.1.q_rotated"].double() @ found["layers.1.k_rotated"].double().repeat_interleave(2, 1).mT
    )
    exact = exact.masked_fill(
        ~torch.ones(23, 23, dtype=torch.bool).tril(), 0
    )  # what the mask hides counts nowhere
    assert row.largest == pytest.approx(exact.abs().max().item(), rel=1e-5)
    assert exact[row.row, row.index[0], row.position, row.index[1]].abs().item() == pytest.approx(
        row.largest, rel=1e-5
    )
    squares = PERSIMMON.model()
    squares.model.layers[2].mlp.dense_h_to_4h.weight.data *= 150
    assert traces.trace(squares, ids).overflow().stage == "layers.2.mlp_act"
    assert "float16 holds all of it" in traces.trace(PERSIMMON.model(), ids).safe()


def test_where_nan_begins(family):
    model, (ids, _) = family.model(), inputs(101)
    assert traces.trace(model, ids).bad() is None
    module = model.get_submodule(Formula(model.config, {}).module("down", 1))
    module.weight.data[0, 0] = math.nan
    row = traces.trace(model, ids).bad()
    assert row.stage == "layers.1.mlp_out" and math.isnan(row.largest)
    assert traces.trace(model, ids).safe() == "layers.1.mlp_out is not finite at token 0: it begins there"


def test_rotary_angles():
    for family in FAMILIES:
        model = family.model()
        rows = traces.trace(model, torch.tensor([[1, 2, 3]])).rotary()
        if family.name in ("gpt_neo", "openai-gpt"):
            assert rows == []
            continue
        assert rows[0]["angle"] == 1 and rows[0]["period"] == pytest.approx(2 * math.pi)
        assert rows[0]["second"] - rows[0]["first"] == len(rows) and rows[-1]["angle"] < rows[0]["angle"]


def test_longrope_factors_are_told():
    n = PHI3.model().config.rotary_dim // 2
    scaling = {
        "type": "longrope",
        "short_factor": [1.0 + i / 8 for i in range(n)],
        "long_factor": [2.0 + i for i in range(n)],
    }
    model = PHI3.model(rope_scaling=scaling, original_max_position_embeddings=12)
    ids, _ = inputs(101)
    assert [row["factor"] for row in traces.trace(model, ids[:, :12]).rotary()] == scaling["short_factor"]
    long = traces.trace(model, ids).rotary()
    assert [row["factor"] for row in long] == scaling["long_factor"]
    base = traces.trace(PHI3.model(), ids).rotary()
    assert [row["angle"] * row["factor"] for row in long] == pytest.approx([row["angle"] for row in base])


def test_only_what_is_asked_for(family):
    model, (ids, _) = family.model(), inputs(101)
    assert list(traces.trace(model, ids, only=["out", "logits", "layers.1.q"])) == [
        "layers.0.out",
        "layers.1.q",
        "layers.1.out",
        "layers.2.out",
        "logits",
    ]
    assert list(traces.trace(model, ids, only=["layers.1.q"]).patch(ablate=0)) == ["layers.1.q"]


def test_saved_under_the_names_of_the_proof_tool(family, tmp_path):
    model, (ids, _) = family.model(), inputs(101)
    found = traces.trace(model, ids)
    found.save(tmp_path / "values.safetensors")
    again = load_file(tmp_path / "values.safetensors")
    assert {name: value.shape for name, value in again.items()} == {
        name: value.shape for name, value in found.items()
    }
    assert all(
        torch.equal(again[name].nan_to_num(9e9), value.nan_to_num(9e9)) for name, value in found.items()
    )


def test_weights_of_few_bits_can_be_traced(family):
    model, (ids, _) = family.model(), inputs(101)
    kernels.quantize(model, "int8-weights")
    found = traces.trace(model, ids)
    shown = found.attribution(3)
    torch.testing.assert_close(shown.values.sum(0), shown.logits, **EXACT)
    assert shown.values[-1].abs().max() < 1e-3


def test_the_documented_classes_can_be_traced():
    model = hf.PhiForCausalLM(hf.PhiConfig(**{k: v for k, v in PHI.tiny.items() if k != "model_type"})).eval()
    ids, _ = inputs(101)
    with torch.no_grad():
        assert torch.equal(traces.trace(model, ids)["logits"], model(ids).logits)


def test_what_cannot_be_traced(family):
    model, (ids, _) = family.model(), inputs(101)
    with pytest.raises(ValueError, match="in training, where dropout hides values: call model.eval"):
        traces.trace(model.train(), ids)
    model.eval()
    with pytest.raises(ValueError, match="there is no stage 'layers.9.q' in 3 layers"):
        traces.trace(model, ids).patch({"layers.9.q": 0.0})
    with pytest.raises(ValueError, match="there is no stage 'queries'"):
        traces.trace(model, ids, only=["queries"])
    for wrong, given in (("a text", "str"), (["a", "text"], "list"), ([[1, 2], [3]], "list"), ({"input_ids": ids}, "dict"),
                         (ids.float(), "torch.float32 of"), ([], "torch.float32 of"), (ids[None], "torch.int64 of")):  # fmt: skip
        with pytest.raises(ValueError, match=f"trace reads token ids.*, not {given}.*: tokenizer.encode"):
            traces.trace(model, wrong)
    with pytest.raises(ValueError, match="token ids are 0 to 100 here, not 5 to 101"):
        traces.trace(model, [5, 101])
    with pytest.raises(ValueError, match="trace needs one of the six language models, and Linear is none"):
        traces.trace(torch.nn.Linear(3, 3), ids)
    with pytest.raises(RuntimeError, match="broken"):
        traces.trace(
            model, ids, changes={"layers.1.q": lambda value: (_ for _ in ()).throw(RuntimeError("broken"))}
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("attend" not in vars(m) for m in model.modules())
