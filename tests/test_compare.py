"""The proof tool: kits, ports, mistakes planted and named."""

import html
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoders import compare, weights
from decoders.cli import main
from decoders.compare import checkpoints, draw, heat, kit, mistakes, ports
from decoders.compare.arithmetic import Arithmetic
from decoders.compare.formula import Formula, stage_order, stages
from decoders.compare.noise import BEYOND
from decoders.compare.on_prompt import on_prompt
from tests import plants
from tests.families import inputs

PORTS = Path(__file__).parent / "ports"
ROOT = Path(__file__).parents[1]


class Kits(dict):
    """A kit of each family, made when it is asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def __missing__(self, family: str) -> kit.Kit:
        self[family] = kit.Kit(kit.make(self.folder / family, family))
        return self[family]


@pytest.fixture(scope="session")
def kits(tmp_path_factory):
    return Kits(tmp_path_factory.mktemp("kits"))


@pytest.fixture
def own(kits, family):
    return kits[family.name]


def computed(own, given=(), dtype="float32", do=None, only=None) -> dict:
    """`CASE/STAGE` of a port: the formula with mistakes, its sums in another order."""
    lowered = {name: w.to(getattr(torch, dtype)) for name, w in own.weights.items()}
    found = {
        case: stages(own.config, lowered, given_inputs, mistakes=given, do=do or Arithmetic(11))
        for case, given_inputs in own.inputs.items()
    }
    return {
        f"{case}/{name}": value
        for case, values in found.items()
        for name, value in values.items()
        if only is None or name in only
    }


def results(own, model, inputs=None) -> dict:
    """`CASE/logits` and loss of one of our models."""
    found, dtype = {}, next(model.parameters()).dtype
    for case, given in (inputs or own.inputs).items():
        given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
        if "past_ids" in given:
            given["past_key_values"] = model(given.pop("past_ids"), output_attentions=True).past_key_values
        with torch.no_grad():
            output = model(**given, output_attentions=True)
        found[f"{case}/logits"] = output.logits
        if output.loss is not None:
            found[f"{case}/loss"] = output.loss
    return found


def names(report) -> list[str]:
    return [m.name for finding in report.findings for m in finding.mistakes]


# ---- The formula and the six files -------------------------------------------------------------------------


def test_formula_equals_the_model_file_in_float64(family):
    model = family.model(dtype=torch.float64)
    ids, mask = inputs(101, padded=True)
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = stages(model.config, dict(model.named_parameters()), given, gradients=True)
    output = model(**given, output_hidden_states=True, output_attentions=True)
    output.loss.backward()
    real = mask.bool()
    assert (found["logits"] - output.logits)[real].abs().max() < 1e-12 and (
        found["loss"] - output.loss
    ).abs() < 1e-12
    for i, weights_of_layer in enumerate(output.attentions):
        assert (found[f"layers.{i}.weights"] - weights_of_layer).abs().max() < 1e-13
    for i in range(len(output.attentions) - 1):
        assert (found[f"layers.{i}.out"] - output.hidden_states[i + 1])[real].abs().max() < 1e-12
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (found[f"grad.{name}"] - p.grad).abs().max() < 1e-12, name


def test_every_stage_of_the_model_file_is_within_float64_noise(own):
    model = own.model_class(own.config).double().eval()
    missing, unexpected = model.load_state_dict(own.weights64, strict=False)
    assert not unexpected and {*missing} <= {"lm_head.weight"}  # tied
    report = compare.run(own, model, dtype="float64")
    assert report.equal, report
    seen = {row.stage.rpartition(".")[2] for row in report.rows}
    assert {
        "attn_in",
        "weights",
        "heads",
        "attn_out",
        "mlp_up",
        "mlp_act",
        "mlp_out",
        "out",
        "logits",
        "loss",
    } <= seen
    assert sum(row.stage.startswith("grad.") for row in report.rows) > 50


# ---- Kits --------------------------------------------------------------------------------------------------


def test_kit_is_small_and_whole(own):
    assert sum(file.stat().st_size for file in own.folder.iterdir()) < 5_000_000
    assert {"plain", "left", "right", "cached", "positions", "massive"} <= own.expected.keys()
    page = (own.folder / "KIT.md").read_text()
    for case, values in own.expected.items():
        assert f"`{case}`" in page
        for name in values:
            stage = (
                "grad.NAME"
                if name.startswith("grad.")
                else name.split(".", 2)[-1]
                if name.startswith("layers.")
                else name
            )
            assert f"`{stage}`" in page or f".{stage}`" in page, name
    assert {"loss", "logits", *(f"grad.{name}" for name in own.weights)} <= own.expected["plain"].keys()


def test_weights_are_the_same_number_in_every_precision(own):
    for name, w in own.weights.items():
        assert torch.equal(w.bfloat16().float(), w) and torch.equal(w.half().float(), w), name


def test_same_seed_same_kit_and_another_seed_another(tmp_path):
    a, b, c = (
        kit.make(tmp_path / name, "phi", seed=seed, cases=["plain"])
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for file in ("model.safetensors", "expected.safetensors", "inputs.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    assert (a / "model.safetensors").read_bytes() != (c / "model.safetensors").read_bytes()


def test_options_of_a_kit(tmp_path):
    own = kit.Kit(kit.make(tmp_path / "k", "gpt_neo", cases=["plain", "types"], layers=3, format="npz"))
    assert (
        list(own.expected) == ["plain", "types"]
        and own.config.num_layers == 3
        and "layers.2.out" in own.expected["plain"]
    )
    assert (tmp_path / "k" / "model.npz").exists() and compare.run(own, computed(own)).equal
    with pytest.raises(ValueError, match="no case middle"):
        kit.make(tmp_path / "x", "phi", cases=["middle"])
    with pytest.raises(ValueError, match="neither a checkpoint nor one of"):
        kit.make(tmp_path / "x", "llama")
    with pytest.raises(ValueError, match="layers must be"):
        kit.make(tmp_path / "x", "phi", layers=0)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["gpt-neo", "openai-gpt", "phi", "phi3", "persimmon", "fuyu"])
def test_kit_with_the_settings_of_a_checkpoint(name, tmp_path):
    own = kit.Kit(kit.make(tmp_path / "k", str(ROOT / "checkpoints" / f"tiny-{name}"), cases=["plain"]))
    assert compare.run(own, computed(own)).equal
    theirs = json.loads((ROOT / "checkpoints" / f"tiny-{name}" / "config.json").read_text())
    assert own.config_json["model_type"] == theirs["model_type"]


# ---- A correct port has no mistake -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_our_loaded_model_is_within_the_noise(own, dtype):
    """With the fast kernels under it, looked into by hooks."""
    model = weights.load(own.model_class, own.folder, dtype=getattr(torch, dtype))
    report = compare.run(own, model, dtype=dtype)
    assert report.equal and not report.findings and not report.roundings, report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("how", ["sdpa", "fused", pytest.param("compiled", marks=pytest.mark.proof)])
def test_other_ways_to_compute_it_rightly_have_no_name(own, dtype, how):
    model = own.model_class(own.config).eval()
    model.load_state_dict(own.weights, strict=False)
    model.to(getattr(torch, dtype))
    port = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    cases = ["plain", "left"] if how == "compiled" else None  # a graph for each takes seconds
    if how == "fused":  # q, k and v from one matrix, as speed wants it
        fuse(model)
    if how == "sdpa":  # no attention weights are asked for, so the kernel is fused
        port = results_without_weights(own, model)
    report = compare.run(own, port, dtype=dtype, cases=cases)
    assert report.equal and not report.findings and not report.roundings, report


def results_without_weights(own, model) -> dict:
    found = {}
    for case, given in own.inputs.items():
        given = {
            name: t.to(next(model.parameters()).dtype) if t.is_floating_point() else t
            for name, t in given.items()
        }
        if "past_ids" in given:
            given["past_key_values"] = model(given.pop("past_ids")).past_key_values
        found[f"{case}/logits"] = model(**given).logits.detach()
    return found


def fuse(model) -> None:
    for part in list(model.modules()):
        if hasattr(part, "q_proj") and hasattr(part, "k_proj"):
            linears = (part.q_proj, part.k_proj, part.v_proj)
            fused = torch.nn.Linear(
                linears[0].in_features, sum(p.out_features for p in linears), bias=linears[0].bias is not None
            )
            fused.weight = torch.nn.Parameter(torch.cat([p.weight for p in linears]))
            if fused.bias is not None:
                fused.bias = torch.nn.Parameter(torch.cat([p.bias for p in linears]))
            sizes = [p.out_features for p in linears]
            part.q_proj, part.k_proj, part.v_proj = (Part(fused, sizes, i) for i in range(3))


class Part(torch.nn.Module):
    """One part of a fused product."""

    def __init__(self, fused, sizes, i):
        super().__init__()
        self.fused, self.sizes, self.i = fused, sizes, i

    def forward(self, x):
        return self.fused(x).split(self.sizes, -1)[self.i]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.proof) for n in range(1, 8))])
def test_rounding_otherwise_has_no_name(own, dtype, seed):
    for do in (Arithmetic(100 + seed), Arithmetic(200 + seed, stepwise=dtype != "float32")):
        report = compare.run(own, computed(own, dtype=dtype, do=do), dtype=dtype)
        assert report.equal and not report.findings and not report.roundings, report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_is_within_the_noise(own, dtype):
    pytest.importorskip("transformers")
    report = compare.run(own, "transformers", dtype=dtype)
    assert report.equal and not report.findings and not report.roundings, report
    assert {row.case for row in report.rows} == own.expected.keys() - (
        {"cached"} if own.family == "openai-gpt" else set()
    )


# ---- Names of mistakes -------------------------------------------------------------------------------------

SILENT = {"positions start at one"}  # a rotation knows distances only
SAME = {"rotary: turned the other way", "rotary: cos and sin swapped"}  # in their scores


some = pytest.mark.parametrize(
    "every", [pytest.param(8, id="some"), pytest.param(1, id="all", marks=pytest.mark.proof)]
)


def is_named(report, *planted) -> bool:
    got = names(report)
    return set(got) == set(planted) or (
        len(got) == len(planted)
        and all(a == b or {a, b} <= SAME for a, b in zip(sorted(got), sorted(planted), strict=True))
    )


def test_table_of_mistakes(family):
    """At least 25 for each, a sentence and a fix each, no two of one name."""
    known = mistakes.of(family.name)
    assert len(known) >= 25 and len({m.name for m in known}) == len(known)
    assert all(m.name and m.fix and m.steps for m in known)
    assert len(plants.fitting(family.name)) >= 50


@pytest.mark.proof
def test_a_planted_model_computes_the_formula_with_that_mistake(own):
    """Written apart, to the last digit alike: both say the same of a mistake."""
    for m in [m for m in plants.fitting(own.family) if not m.half]:
        model = plants.planted(own.family, own.config_json, own.weights, m.name).double()
        for case, given in own.inputs.items():
            try:
                wrong = stages(own.config, own.weights64, given, mistakes=(m,))
            except IndexError:  # a wrong position behind the table's end
                continue
            found = results(own, model, {case: given})
            seen = ~own.expected[case]["logits"].isnan()
            for name in ("logits", "loss"):
                if name in wrong:
                    a, b = found[f"{case}/{name}"], wrong[name]
                    a, b = (a[seen], b[seen]) if name == "logits" else (a, b)
                    close = {"atol": 1e-8, "rtol": 1e-8, "equal_nan": True}
                    torch.testing.assert_close(a, b, msg=lambda s, m=m: f"{m.name}: {s}", **close)  # noqa: B023


@some
def test_mistakes_in_our_own_file_are_named_by_their_logits(own, every):
    """Planted as an edit of the model file, and seen by nothing but its logits and losses."""
    wrong, known = [], [m for m in plants.fitting(own.family) if not m.half and not m.rounds][3::every]
    for m in known:
        model = plants.planted(own.family, own.config_json, own.weights, m.name)
        report = compare.run(own, results(own, model))
        if report.equal or not is_named(report, m.name):
            wrong.append((m.name, names(report)))
    assert len(wrong) <= 0.02 * len(known), wrong


@pytest.mark.proof  # all of them; `make test` has some by their logits
@pytest.mark.parametrize("every", [pytest.param(1, id="all")])
def test_mistakes_in_a_module_are_named_with_hooks(own, every):
    wrong, known = [], plants.fitting(own.family)[:: 2 * every]
    for m in known:
        dtype = "bfloat16" if m.half or m.rounds else "float32"
        model = plants.planted(own.family, own.config_json, own.weights, m.name).to(getattr(torch, dtype))
        report = compare.run(own, model, dtype=dtype)
        if not is_named(report, m.name) and not any(m.name in shown for shown in report.roundings):
            wrong.append((m.name, names(report)))
    assert len(wrong) <= 0.02 * len(known), wrong


@some
def test_mistakes_are_named_by_their_stages(own, every):
    """Also those that have no simple edit of a file, from all inner values."""
    wrong, known = [], mistakes.of(own.family)[5::every]
    for m in known:
        dtype = "float32" if not m.half and not m.rounds else "float16" if "norm" in m.name else "bfloat16"
        report = compare.run(own, computed(own, (m,), dtype), dtype=dtype)
        shown = is_named(report, m.name) or any(m.name in shown for shown in report.roundings)
        if not shown and not (report.equal and m.name in SILENT):
            wrong.append((m.name, names(report)))
    assert len(wrong) <= 0.02 * len(known), wrong


def pairs_of(known, every: int, start: int = 0):
    return list(itertools.combinations([m for m in known if not m.half and not m.rounds], 2))[start::every]


def unexplained(own, pairs, run) -> list:
    """Pairs that get another name; one of which alone shows may be named alone, and what shows nothing may not."""
    wrong = []
    for pair in pairs:
        try:
            report = run(pair)
        except IndexError:  # a wrong position behind the table's end
            continue
        got = set(names(report))
        if (
            not report.equal
            and not is_named(report, *(m.name for m in pair))
            and not (got and same_without(own, pair, got))
        ):
            wrong.append(([m.name for m in pair], sorted(got)))
    return wrong


def same_without(own, pair, got) -> bool:
    """Whether the named ones alone give the same numbers: then nobody could know of the others."""
    named = tuple(m for m in mistakes.of(own.family) if m.name in got)
    a, b = (computed(own, given, "float64") for given in (pair, named))
    return all(
        (a[name] - b[name]).nan_to_num().abs().max() < 1e-7
        for name in a
        if name.endswith(("logits", "loss")) and name in b
    )


def in_the_formula(own, pair, only=None):
    return compare.run(own, computed(own, pair, only=only))


def in_our_file(own, pair, only=None):
    """Planted as two edits of the model file; in the formula where the second finds nothing left to edit."""
    try:
        model = plants.planted(own.family, own.config_json, own.weights, *(m.name for m in pair))
    except LookupError:
        return in_the_formula(own, pair, only)
    return compare.run(own, results(own, model) if only else model)


RESULTS = ("logits", "loss")


@pytest.mark.proof
def test_some_pairs_are_named(own):
    for run, only in ((in_the_formula, None), (in_our_file, RESULTS)):
        pairs = pairs_of(plants.fitting(own.family), 999, 2)
        assert not unexplained(own, pairs, lambda pair: run(own, pair, only)), run  # noqa: B023


@pytest.mark.pairs
@pytest.mark.parametrize("only", [None, RESULTS], ids=["with hooks", "by logits"])
@pytest.mark.parametrize("part", range(4))
def test_every_fifth_pair_in_our_own_file_is_named(own, part, only):
    """In turn seen with hooks, and by nothing but logits and losses."""
    pairs = pairs_of(plants.fitting(own.family), 5, 2)[part * 2 + (only is None) :: 8]
    wrong = unexplained(own, pairs, lambda pair: in_our_file(own, pair, only))
    assert len(wrong) <= 0.05 * len(pairs), wrong


@pytest.mark.proof
def test_what_only_one_case_shows_is_named_beside_a_pair(kits):
    """By logits alone: two mistakes in every case and a third with a cache; then a third that nobody knows."""
    own, known = kits["phi"], {m.name: m for m in mistakes.of("phi")}
    given = [
        known[name]
        for name in ("attention: k and v swapped", "norm: epsilon 0.001", "positions begin anew with a cache")
    ]
    report = compare.run(own, computed(own, tuple(given), only=("logits", "loss")))
    assert set(names(report)) == {m.name for m in given}, report
    values = computed(own, tuple(given[:2]), only=("logits", "loss"))
    values["cached/logits"] = values["cached/logits"].flip(-1)
    report = compare.run(own, values)
    assert set(names(report)) == {m.name for m in given[:2]} and "cached" not in report.findings[0].cases
    assert set(report.findings[0].cases) == own.expected.keys() - {"cached"} and "more is wrong" in str(
        report
    )


def test_three_mistakes_are_told_apart_by_their_stages(own):
    known = {m.name: m for m in mistakes.of(own.family)}
    given = [
        known[name] for name in ("attention: k and v swapped", "norm: epsilon 0.001", "activation: none")
    ]
    report = compare.run(own, computed(own, tuple(given)))
    assert set(names(report)) == {m.name for m in given}, report


@pytest.mark.proof
def test_a_mistake_that_nobody_knows_gets_no_name_but_a_likeness(own):
    """Speculative names are worse than none."""
    state = dict(own.weights)
    name = next(n for n in state if n.endswith(f"{own_part(own, 'o')}.weight"))
    changed = state[name].clone()
    (
        changed[:12] if own.family == "openai-gpt" else changed[:, :12]
    ).zero_()  # what the first head says is lost
    model = own.model_class(own.config).eval()
    model.load_state_dict({**state, name: changed}, strict=False)
    report = compare.run(own, model)
    assert not report.equal and not report.findings
    assert report.first.stage == "layers.0.attn_out", report


def own_part(own, part) -> str:
    return Formula(own.config, {}).parts[part]


@pytest.mark.proof
@pytest.mark.parametrize(("change", "shown"), [
    (lambda x: x + 0.5, "0.5 off"),
    (lambda x: torch.nn.functional.dropout(x, 0.1), "dropout of 0.1 is active"),
    (lambda x: torch.cat([x[:, :7], x[:, 7:] * 1.5], 1), "from position 7 on"),
    (lambda x: x.flip(-1), "in another order"),
    (lambda x: torch.where(torch.arange(67) == 5, x + 1, x), "only dimension 5 of 67"),
    (lambda x: torch.where(torch.arange(2)[:, None, None] == 1, x.sin(), x), "only row 1 of 2"),
    (lambda x: x + x.sin() * 1e-3 * torch.arange(13)[:, None] ** 2, "grows with the position"),
    (lambda x: torch.where(x > 2, torch.nan, x), "NaN or infinite, first at"),
])  # fmt: skip
def test_what_a_difference_looks_like(kits, change, shown):
    own = kits["phi"]
    values = {"plain/logits": change(own.expected["plain"]["logits"])}
    report = compare.run(own, values, dtype="float32")
    assert not report.equal and not report.findings and shown in " ".join(report.likeness), report


def test_a_multiple_is_named_with_its_number(kits):
    own = kits["phi"]
    report = compare.run(own, {"plain/logits": own.expected["plain"]["logits"] * 2}, dtype="float32")
    assert "multiplied by 2.0" in report.findings[0].mistakes[0].name, report


# ---- Where it begins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        ("embeddings", "layers.0.weights", "layers.1.out", "logits"),
        ("layers.0.attn_out", "layers.0.mlp_in", "logits"),
        ("layers.1.scores", "norm"),
    ],
)
def test_first_difference_of_part_of_the_stages(own, given):
    """A mistake in layer 0's scores shows in the first stage that was given behind it."""
    m = next(m for m in mistakes.of(own.family) if "scores divided by the root of the width" in m.name)
    report = compare.run(own, computed(own, (m,), only=given), names=False)
    behind = [
        name
        for name in sorted(given, key=stage_order)
        if stage_order(name) >= stage_order("layers.0.scores")
        and name in own.expected["plain"]
        and not (own.family == "phi" and name.startswith("layers.0.mlp"))
    ]
    assert report.first.stage == behind[0], report


def test_another_order_of_dimensions_is_no_difference(kits):
    """Rows of q and k permuted for a rotation of neighbours: their products are the same."""
    own = kits["phi"]
    values = computed(own)
    order = torch.cat([torch.arange(8).view(2, -1).t().flatten(), torch.arange(8, 12)])
    for name in values:
        if name.endswith((".q", ".k", ".q_rotated", ".k_rotated")):
            values[name] = values[name][..., order]
    report = compare.run(own, values)
    assert report.equal and any(row.mark == "~" for row in report.rows), report


def test_values_in_other_shapes(kits):
    own = kits["phi3"]
    values = computed(own)
    for name, value in list(values.items()):
        if name.endswith(("q", "k", "v", "rotated")):
            values[name] = value.transpose(1, 2).flatten(2) if "layers.0" in name else value.transpose(1, 2)
        if name.startswith(("cached/", "massive/")) and value.dim() > 2:
            values[name] = value.squeeze(0)
    report = compare.run(own, values)
    assert report.equal, report


@pytest.mark.parametrize(("cut", "reason"), [
    (lambda x: x[:, -1], "of the last token only"), (lambda x: x.transpose(1, 2), "transposed"),
    (lambda x: torch.nn.functional.pad(x, (0, 61)), "padded to a round size"), (lambda x: x[:1], "one row only"),
])  # fmt: skip
def test_shapes_that_differ_are_told_with_the_likely_reason(kits, cut, reason):
    own = kits["phi"]
    with pytest.raises(ValueError, match=reason):
        compare.run(own, {"plain/logits": cut(own.expected["plain"]["logits"])})


def test_precision_of_values_is_seen(kits):
    own = kits["phi"]
    for dtype in ("bfloat16", "float16", "float32"):
        values = {name: value.float() for name, value in computed(own, dtype=dtype, only=("logits",)).items()}
        report = compare.run(own, values)
        assert report.dtype == dtype and report.equal


# ---- Ports -------------------------------------------------------------------------------------------------

EXAMPLES = {"openai-gpt": "numpy_gpt1", "phi": "flat_phi", "phi3": "llama_phi3"}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ports_in_other_styles_are_equal(kits, name, dtype):
    if name == "openai-gpt":
        dtype = "float32"  # NumPy has no bfloat16
    report = compare.run(kits[name], f"{PORTS / EXAMPLES[name]}.py:build", dtype=dtype)
    assert report.equal and not report.findings and not report.roundings, report


def test_llamas_style_is_looked_into(kits):
    """Half precision too, where its rotation is computed in float32 and ours is rounded."""
    for dtype in ("float32", "bfloat16", "float16"):
        report = compare.run(kits["phi3"], f"{PORTS / 'llama_phi3.py'}:build", dtype=dtype)
        assert report.equal and len(report.rows) > 80 and not report.roundings, report


EDITS = {  # of the ports' sources
    "openai-gpt": {
        "activation: GELU as x sigmoid(1.702 x) where this model has the tanh approximation of GELU":
            ("return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi, dtype=np.float32) * (x + 0.044715 * x**3)))", "return x / (1 + np.exp(-1.702 * x))"),
        "attention: scores not divided by sqrt(D)": (" / np.sqrt(c // heads, dtype=np.float32)", ""),
        "attention: no causal mask": ("np.tril(np.ones((t, t), bool))", "np.ones((t, t), bool)"),
        "attention: padding is not hidden": ("attention_mask.numpy() > 0", "attention_mask.numpy() > -1"),
        "norm: variance divided by n - 1": ("(x * x).mean(-1, keepdims=True)", "(x * x).sum(-1, keepdims=True) / (x.shape[-1] - 1)"),
        "position_ids are not read": ("if position_ids is None else position_ids.numpy()", ""),
        "token_type_ids are not read": ("if token_type_ids is not None:", "if False:"),
        "attention: k and v swapped": ("q, k, v = (", "q, v, k = ("),
        "attention: q and k swapped": ("q, k, v = (", "k, q, v = ("),
        "attention: heads joined without swapping H and T back": ("bhqk,bkhd->bqhd", "bhqk,bkhd->bhqd"),
        "layer: attention's input is not added": ("norm(x + attention(", "norm(0 * x + attention("),
        "layer: the MLP's input is not added": ("norm(n + m", "norm(m"),
    },
    "phi": {
        "rotary: neighbours paired (GPT-J) instead of halves": (
            "a, b = t[..., : R // 2], t[..., R // 2 : R]\n                turned.append(torch.cat([a * cos - b * sin, a * sin + b * cos, t[..., R:]], dim=-1))",
            "a, b = t[..., :R:2], t[..., 1:R:2]\n                turned.append(torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), t[..., R:]], dim=-1))"),
        "rotary: turned the other way": ("a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin"),
        "rotary: frequencies of the whole head (exponents over D)": ("torch.arange(0, R, 2) / R", "torch.arange(0, R, 2) / D"),
        "rotary: base 1000000": ("1 / 10000 **", "1 / 1e6 **"),
        "activation: GELU with the exact erf where this model has the tanh approximation of GELU": (', approximate="tanh"', ""),
        "attention: all heads read the first key/value head": (
            "cache.append((k, v))", "cache.append((k, v))\n            k, v = (t[:, :, :1].expand(-1, -1, K, -1) for t in (k, v))"),
        "attention: with a cache, the mask is aligned at the top left": ("triu(past + 1)", "triu(1)"),
        "positions begin anew with a cache": ("torch.arange(past, past + T)", "torch.arange(T)"),
        "attention: a token sees the one after it": ("triu(past + 1)", "triu(past + 2)"),
        "bias of the logits missing": (' + weights["lm_head.bias"]', ""),
        "layer: attention first, the MLP on its sum": (
            "m = torch.nn.functional.linear(n,", "x = x + y\n            y = 0\n            n = torch.layer_norm(x, x.shape[-1:], *w(\"input_layernorm\"), 1e-5)\n            m = torch.nn.functional.linear(n,"),
        "attention: padding is not hidden": ("attention_mask is not None", "False"),
    },
    "phi3": {
        "longrope: short factors beyond the limit": ('"long_factor" if positions.max() >= original else "short_factor"', '"short_factor"'),
        "longrope: long factors at the limit already": ("positions.max() >= original", "positions.max() >= original - 1"),
        "longrope: cos and sin not scaled": ("torch.full_like(angles, scale)", "torch.ones_like(angles)"),
        "attention: the window counts one token too many": ("triu(1 - self", "triu(0 - self"),
        "MLP: gate and up swapped": ("w1, w3 = weights", "w3, w1 = weights"),
        "attention: key/value heads taken in turns": ("k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)", "k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1)"),
        "norm: mean subtracted (LayerNorm)": ("y = x.float()", "y = x.float() - x.float().mean(-1, keepdim=True)"),
        "layer: attention and MLP side by side": ("return h + self.feed_forward(self.ffn_norm(h))", "return h + self.feed_forward(self.ffn_norm(x))"),
        "layer: the MLP's input is not added": ("return h + self.feed_forward", "return self.feed_forward"),
        "rotary: turned the other way": ("torch.polar(torch.full_like(angles, scale), angles)", "torch.polar(torch.full_like(angles, scale), -angles)"),
    },
}  # fmt: skip


def rewritten(name: str, *wrong: str) -> str | None:
    """The source of a port with these mistakes; None where the second finds nothing left to edit."""
    text = (PORTS / f"{EXAMPLES[name]}.py").read_text()
    for old, new in (EDITS[name][mistake] for mistake in wrong):
        if old not in text:
            return None
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    ("name", "mistake"), [pytest.param(f, m, id=f"{f}: {m}") for f in EDITS for m in EDITS[f]]
)
def test_mistakes_in_rewritten_ports_are_named(kits, name, mistake, tmp_path):
    (tmp_path / "port.py").write_text(rewritten(name, mistake))
    report = compare.run(kits[name], f"{tmp_path / 'port.py'}:build")
    assert is_named(report, mistake), report


@pytest.mark.proof
@pytest.mark.parametrize("name", EDITS)
def test_every_fifth_pair_in_rewritten_ports_is_named(kits, name, tmp_path):
    def run(pair):
        (tmp_path / "port.py").write_text(rewritten(name, *(m.name for m in pair)))
        return compare.run(kits[name], f"{tmp_path / 'port.py'}:build")

    known = [m for m in mistakes.of(name) if m.name in EDITS[name]]
    pairs = [pair for pair in pairs_of(known, 5) if rewritten(name, *(m.name for m in pair))]
    wrong = unexplained(kits[name], pairs, run)
    assert len(wrong) <= 0.05 * len(pairs), wrong


@pytest.fixture(scope="session")
def c_port(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("c")

    def build(old="", new=""):
        text = (PORTS / "gpt_neo.c").read_text()
        assert old in text
        source, program = folder / "port.c", folder / "port"
        source.write_text(text.replace(old, new) if old else text)
        subprocess.run(["cc", "-O2", "-o", program, source, "-lm"], check=True, capture_output=True)
        return program

    return build


@pytest.mark.parametrize(("mistake", "old", "new"), [
    ("", "", ""),
    ("attention: the window counts one token too few", "t >= WINDOW ? t - WINDOW + 1", "t >= WINDOW - 1 ? t - WINDOW + 2"),
    ("attention: scores divided by sqrt(D), which GPT-Neo does not", "if (mask && !mask[s])", "scores[s] /= sqrtf(D); if (mask && !mask[s])"),
    ("attention: global and local layers swapped", "l % 2 == 1", "l % 2 == 0"),
    ("activation: SiLU where this model has the tanh approximation of GELU", "return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));", "return x / (1 + expf(-x));"),
    ("positions start at one", "(places ? places[t] : t) * C", "((places ? places[t] : t) + 1) % 97 * C"),
    ("norm: epsilon 1e-12", "1e-5f", "1e-12f"),
    ("layer: the MLP's input is not added", "x[t * C + i] += sum[i];\n        }\n        memcpy", "x[t * C + i] = sum[i];\n        }\n        memcpy"),
])  # fmt: skip
def test_a_program_in_c(kits, c_port, mistake, old, new, tmp_path):
    """It reads the kit's safetensors by itself, and writes its own."""
    own = kits["gpt_neo"]
    subprocess.run([c_port(old, new), own.folder, tmp_path / "theirs.safetensors"], check=True)
    report = compare.run(own, tmp_path / "theirs.safetensors")
    assert report.equal if not mistake else is_named(report, mistake), report


@pytest.fixture(scope="session")
def c_compare(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("c") / "compare"
    command = ["cc", "-O2", "-Wall", "-Werror", "-o", program, PORTS / "compare.c", "-lm"]
    subprocess.run(command, check=True, capture_output=True)
    return program


def in_c(program, *arguments) -> tuple[int, str, str]:
    found = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize("place", ["ready", "made"])
@pytest.mark.parametrize(("old", "new"), [("", ""), ("0.044715f", "0.05f"), ("1e-5f", "1e-3f")])
def test_the_table_in_c_says_what_ours_does(kits, c_port, c_compare, place, old, new, tmp_path):
    """Somebody without Python: the kit, his program, and a comparison in C."""
    own = kits["gpt_neo"] if place == "made" else kit.Kit(ROOT / "kits" / "gpt_neo")
    theirs = tmp_path / "theirs.safetensors"
    subprocess.run([c_port(old, new), own.folder, theirs], check=True)
    report = compare.run(own, theirs, names=False)
    status, out, _ = in_c(c_compare, own.folder, theirs)
    assert status == (0 if report.equal else 1)
    lines = {}
    for line in out.splitlines()[:-1]:
        mark, name, *numbers = line[:1], *line[1:].split()
        if numbers[0] == "largest":
            case = name
        else:
            lines[case, name] = mark, *map(float, numbers)
    assert lines.keys() == {(row.case, row.stage) for row in report.rows}
    for row in report.rows:
        mark, largest, typical, units = lines[row.case, row.stage]
        assert mark == ("=" if row.units <= BEYOND else "x")
        assert (largest, typical, units) == pytest.approx((row.largest, row.typical, row.units), rel=0.06)
    if not report.equal:
        assert f"First difference: {report.first.stage} in case" in out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_table_in_c_reads_other_precisions(kits, c_compare, dtype, tmp_path):
    own = kits["phi"]
    values = computed(own, dtype=dtype, only=("logits", "loss", "layers.1.weights"))
    save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / "a.safetensors")
    status, out, _ = in_c(c_compare, own.folder, tmp_path / "a.safetensors", dtype)
    assert status == 0 and f"4 times the noise of {dtype}" in out
    for name in values:
        if name.endswith("weights"):
            values[name] = values[name] * 1.5
    save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / "a.safetensors")
    status, out, _ = in_c(c_compare, own.folder, tmp_path / "a.safetensors", dtype)
    assert status == 1 and "First difference: layers.1.weights in case plain" in out


def test_the_table_in_c_refuses_what_is_broken(kits, c_compare, tmp_path):
    own, file = kits["phi"], tmp_path / "a.safetensors"
    assert in_c(c_compare, own.folder, file)[0] == 2
    file.write_bytes(b"no")
    assert in_c(c_compare, own.folder, file)[0] == 2
    save_file({"other": torch.zeros(3)}, file)
    status, _, err = in_c(c_compare, own.folder, file)
    assert status == 2 and "holds no stage of this kit" in err
    save_file({"plain/logits": torch.zeros(3)}, file)
    assert in_c(c_compare, own.folder, file)[0] == 2
    file.write_bytes(file.read_bytes()[:-4])
    assert in_c(c_compare, own.folder, file)[0] == 2


# ---- Ready kits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", draw.SMALL)
def test_ready_kits_are_small_and_what_the_command_makes(name, tmp_path):
    own, new = kit.Kit(ROOT / "kits" / name), kit.Kit(kit.make(tmp_path / "k", name, compact=True))
    assert sum(file.stat().st_size for file in own.folder.iterdir()) < 300_000
    assert own.config_json == new.config_json and own.inputs.keys() == new.inputs.keys()
    for file in ("KIT.md", "kit.json", "inputs.safetensors", "model.safetensors"):
        assert (own.folder / file).read_bytes() == (new.folder / file).read_bytes(), file
    for case, stages_of_case in new.expected.items():
        for stage, value in stages_of_case.items():
            torch.testing.assert_close(own.expected[case][stage], value, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", draw.SMALL)
def test_ready_kits_tell_a_right_port_and_a_wrong_one(name):
    own = kit.Kit(ROOT / "kits" / name)
    assert compare.run(own, computed(own)).equal
    m = next(m for m in mistakes.of(name) if m.name == "attention: k and v swapped")
    assert names(compare.run(own, computed(own, (m,)))) == [m.name]


@pytest.mark.parametrize(("spelled", "family_name"), [
    ("openai_gpt", "openai-gpt"), ("OpenAI-GPT", "openai-gpt"), ("gpt1", "openai-gpt"), ("gpt-1", "openai-gpt"),
    ("gpt-neo", "gpt_neo"), ("GPT Neo", "gpt_neo"), ("gptneo", "gpt_neo"), ("phi-3", "phi3"), ("Phi_3", "phi3"),
    ("Phi", "phi"), ("Persimmon", "persimmon"), ("FUYU", "fuyu"),
])  # fmt: skip
def test_usual_spellings_of_a_family(spelled, family_name):
    assert draw.small_config(spelled) == draw.small_config(family_name)


# ---- The answer --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wrong(kits):
    own = kits["persimmon"]
    m = next(m for m in mistakes.of("persimmon") if m.name == "attention: q normed, k not")
    return compare.run(own, computed(own, (m,)))


def test_answer_as_text_json_and_page(wrong):
    text = str(wrong)
    assert text.startswith("\nFirst difference: layers.0.k_normed in every case is ")
    assert "Your port equals ours with this mistake" in text and "fix: norm both" in text
    assert any(line.startswith("x layers.0.k_normed") for line in text.splitlines())
    shown = json.loads(json.dumps(wrong.as_json(), allow_nan=False))
    assert shown["equal"] is False and shown["first"]["stage"] == "layers.0.k_normed"
    assert shown["mistakes"][0]["names"] == ["attention: q normed, k not"] and len(shown["rows"]) == len(
        wrong.rows
    )
    page = heat.page(wrong)
    assert (
        page.count('<td class="stage">') == len({row.stage for row in wrong.rows})
        and page.count('class="first"') == 1
    )
    assert "<script" not in page and "http" not in page


def test_a_report_shows_itself_in_a_frame(wrong):
    """A notebook's style stays its own."""
    markup = wrong._repr_html_()
    assert markup.startswith('<iframe sandbox=""') and markup.count("<") == 2
    assert html.unescape(markup.partition('srcdoc="')[2].rpartition('"></iframe>')[0]) == heat.page(wrong)


def test_sure_is_a_count_and_a_fall(wrong):
    finding = wrong.findings[0]
    assert finding.values > 10_000 and finding.before > 1e4 and finding.units < BEYOND and not finding.alike


# ---- Bad input ---------------------------------------------------------------------------------------------


def run_main(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


PORT = """
import os
import torch
from decoders.{file} import {name} as Model

def build(config, weights):
    model = Model(Model.config_class.from_dict(config)).eval()
    model.load_state_dict(weights, strict=False)
    return model

def talking(config, weights):
    print("weights are here")
    os.write(1, b"and so says C")
    model = build(config, weights)
    def port(input_ids, **inputs):
        print("thinking ...")
        return model(input_ids, **inputs)
    return port

def raising(config, weights):
    def port(input_ids):
        return helper(input_ids)
    return port

def helper(ids):
    raise KeyError("a name of theirs")

def dropping(config, weights):
    return build({{**config, "resid_pdrop": 0.2}}, weights).train()

def nothing(config, weights):
    return lambda input_ids: input_ids.float()

answer = 42
"""


@pytest.fixture(scope="session")
def port(tmp_path_factory):
    file = tmp_path_factory.mktemp("port") / "port.py"
    file.write_text(PORT.format(file="phi", name="PhiForCausalLM"))
    return file


def test_exit_status_and_streams(kits, port, capsys, tmp_path):
    folder = kits["phi"].folder
    status, out, err = run_main(capsys, folder, f"{port}:build")
    assert status == 0 and "computes what phi expects" in out and not err
    status, out, err = run_main(capsys, folder, f"{port}:talking", "--json")
    assert status == 0 and json.loads(out)["equal"] and "thinking" in err
    status, out, err = run_main(capsys, folder, f"{port}:raising")
    assert status == 2 and not out and "KeyError: 'a name of theirs'" in err and "in helper" in err
    assert "decoders/compare" not in err and len(err.splitlines()) < 12
    status, out, err = run_main(capsys, folder, f"{port}:dropping", "--html", tmp_path / "page.html")
    assert status == 1 and "Two runs of the same case differ" in out and (tmp_path / "page.html").exists()
    for what, shown in ((f"{port}:nothing", "no logits with 67 columns"), (f"{port}:answer", "is no function"),
                       (f"{port}:absent", "has no absent"), ("nonsense", "no module:function"), ("absent.npz", "missing"),
                       ("absent.module:build", "cannot be imported"), ("absent.py:build", "absent.py is missing")):  # fmt: skip
        status, out, err = run_main(capsys, folder, what)
        assert status == 2 and shown in err and not out and len(err.splitlines()) == 1, what
    status, out, err = run_main(capsys, tmp_path, "transformers")
    assert status == 2 and "is no kit" in err
    assert run_main(capsys, folder)[0] == 2 and run_main(capsys, "--make", tmp_path / "k")[0] == 2


ODD = {
    "meta": ("torch.empty(*input_ids.shape, 67, device='meta')", "is a meta tensor"),
    "sparse": ("torch.zeros(*input_ids.shape, 67).to_sparse()", "is a sparse tensor"),
    "text": ("{'logits': 'many'}", "plain/logits is str: give numbers"),
    "nothing": ("{'logits': None}", "plain/logits is NoneType: give numbers"),
    "words": ("{'layers.0.out': ['a', 'b']}", "plain/layers.0.out is list: give numbers"),
    "complex": ("torch.zeros(*input_ids.shape, 67, dtype=torch.complex64)", "no logits with 67 columns"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
def test_what_holds_no_numbers_is_a_sentence_and_unusable(kits, kind, module, tmp_path, capsys):
    """Status 1 means different; a traceback helps nobody."""
    result, message = ODD[kind]
    port = f"def port(input_ids):\n    return {result}"
    if module:
        port = f"class Port(torch.nn.Module):\n    def forward(self, input_ids):\n        return {result}\nport = Port()"
    (tmp_path / "odd.py").write_text(f"import torch\n{port}\ndef build(config, weights):\n    return port\n")
    status, out, err = run_main(
        capsys, kits["phi"].folder, f"{tmp_path / 'odd.py'}:build", "--cases", "plain"
    )
    assert status == 2 and not out and len(err.splitlines()) == 1 and message in err, err


def test_odd_inner_values_of_a_module_are_passed_over(kits):
    """A module may hand sparse or meta tensors about, as long as its results are numbers."""
    own = kits["phi"]
    inner = own.model_class(own.config).eval()
    inner.load_state_dict(own.weights)

    class Odd(torch.nn.Module):
        def forward(self, x):
            return x, torch.zeros(3, 67).to_sparse(), torch.empty(3, 67, device="meta")

    class Port(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.odd = inner, Odd()

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return self.odd(self.inner(input_ids, attention_mask, position_ids).logits)[0]

    assert compare.run(own, Port()).equal


def test_files_of_a_kit_are_as_open_as_others(kits, tmp_path):
    (tmp_path / "other").touch()
    mode = (tmp_path / "other").stat().st_mode
    assert {file.stat().st_mode for file in kits["phi"].folder.iterdir()} == {mode}


def test_what_a_port_prints_is_not_in_the_answer(kits, port):
    """Neither from Python nor from below it."""
    command = [sys.executable, "-m", "decoders", "compare", kits["phi"].folder, f"{port}:talking", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (
        json.loads(found.stdout)["equal"]
        and "weights are here" in found.stderr
        and "so says C" in found.stderr
    )


def test_make_says_what_to_read(tmp_path, capsys):
    status, out, err = run_main(
        capsys, "--make", tmp_path / "k", "phi", "--cases", "plain,cached", "--layers", "1"
    )
    assert status == 0 and not out and "KIT.md" in err
    assert list(kit.Kit(tmp_path / "k").expected) == ["plain", "cached"]


def test_a_kit_replaces_a_kit_and_a_page_a_page_and_nothing_else(kits, port, tmp_path, capsys):
    """`--make` wrote its config and weights over a checkpoint's."""
    checkpoint = shutil.copytree(ROOT / "checkpoints" / "tiny-phi", tmp_path / "mine")
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    status, _, err = run_main(capsys, "--make", checkpoint, "phi")
    assert status == 2 and "mine is not empty and holds no kit: give another folder" in err
    assert before == {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    for _ in range(2):
        assert run_main(capsys, "--make", tmp_path / "k", "phi", "--cases", "plain", "--layers", "1")[0] == 0
    status, _, err = run_main(capsys, kits["phi"].folder, f"{port}:build", "--html", port)
    assert status == 2 and "port.py exists and is no page: give another file" in err
    for _ in range(2):
        assert run_main(capsys, kits["phi"].folder, f"{port}:build", "--html", tmp_path / "page.html")[0] == 0


def test_broken_kits(kits, tmp_path):
    def changed(name, **values):
        folder = shutil.copytree(kits["phi"].folder, tmp_path / name)
        facts = json.loads((folder / "kit.json").read_text())
        (folder / "kit.json").write_text(json.dumps({**facts, **values}))
        return folder

    with pytest.raises(ValueError, match="kit of version 99"):
        kit.Kit(changed("version", kit=99))
    folder = changed("lacking")
    stored = load_file(folder / "expected.safetensors")
    save_file(
        {name: t for name, t in stored.items() if not name.startswith("noise/")},
        folder / "expected.safetensors",
    )
    with pytest.raises(ValueError, match="no whole kit"):
        kit.Kit(folder)
    (folder / "expected.safetensors").unlink()
    with pytest.raises(OSError, match="missing"):
        kit.Kit(folder)


def test_more_numbers_than_a_file_can_mean(kits, tmp_path):
    numpy = pytest.importorskip("numpy")
    own, file = kits["phi"], tmp_path / "theirs.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as content:
        header = io.BytesIO()
        numpy.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1_000_000,)}
        )
        content.writestr("plain/logits.npy", header.getvalue() + bytes(1000))
    with pytest.raises(ValueError, match="more than can be meant"):
        compare.run(own, file)
    numpy.savez(
        file,
        **{name: value.numpy() for name, value in computed(own, only=("logits",)).items()},
        other=numpy.zeros(3),
    )
    report = compare.run(own, file)
    assert report.equal and "not known to the kit, and left out: other" in report.remarks[0]
    lying = tmp_path / "theirs.safetensors"
    text = json.dumps(
        {"plain/logits": {"dtype": "F32", "shape": [1_000_000], "data_offsets": [0, 4_000_000]}}
    ).encode()
    lying.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        compare.run(own, lying)


def test_nan_in_theirs_is_told_where_it_begins(kits):
    own = kits["phi"]
    values = computed(own)
    for name in values:
        if stage_order(name.partition("/")[2]) >= stage_order("layers.1.mlp_act") and name.startswith(
            "left/"
        ):
            values[name] = values[name] * torch.nan
    report = compare.run(own, values)
    assert report.first.stage == "layers.1.mlp_act" and "in case left has NaN or infinity" in report.sentence
    assert not report.findings


def test_a_port_that_is_called_directly(kits):
    """In code and in a test of one's own."""
    own = kits["phi"]

    def build(config: dict, stored: dict):
        model = own.model_class(own.config).eval()
        model.load_state_dict(stored)
        return lambda input_ids, attention_mask=None, position_ids=None: (
            model(input_ids, attention_mask, position_ids).logits
        )

    report = compare.run(own.folder, build)
    assert report.equal, report
    assert report.remarks == ["cached was not run: the port takes no past_key_values"]
    with pytest.raises(ValueError, match="dtype must be one of"):
        compare.run(own, build, dtype="int8")
    with pytest.raises(ValueError, match="no case middle"):
        compare.run(own, build, cases=["middle"])
    with pytest.raises(ports.PortError):
        compare.run(own, lambda config, stored: sys.exit(3))


# ---- Two checkpoints ---------------------------------------------------------------------------------------


def edited(own, folder, change, config=None) -> Path:
    shutil.copytree(own.folder, folder)
    stored = change(dict(own.weights))
    save_file({name: t.contiguous().clone() for name, t in stored.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({**own.config_json, **config}))
    return folder


def on(part, change):
    return lambda state: {name: change(t) if part in name else t for name, t in state.items()}


def permuted(t):
    order = torch.cat([torch.arange(8).view(2, -1).t().flatten(), torch.arange(8, 12)])
    return t.unflatten(0, (-1, 12))[:, order].reshape(t.shape)


@pytest.mark.parametrize(("name", "change", "shown", "equal"), [
    ("phi", lambda state: state, "all 33 tensors are equal", True),
    ("phi", on("", lambda t: t.bfloat16()), "33 tensors are the same, bfloat16 instead of float32", True),
    ("phi", on("dense.weight", lambda t: t.t()), "2 tensors are transposed", False),
    ("phi", on("k_proj", permuted), "permuted for a rotation of neighbours", False),
    ("phi3", on("norm", lambda t: t + 1), "one more everywhere", False),
    ("phi3", on("gate_up", lambda t: torch.cat(t.chunk(2)[::-1])), "with its halves swapped", False),
    ("phi3", on("embed", lambda t: 2 * t), "2 times as large", False),
    ("phi3", on("embed", lambda t: t[:60]), "60 rows long instead of 67", False),
    ("phi3", on("o_proj", lambda t: t + 0.1), "another:", False),
    ("openai-gpt", on("c_attn", lambda t: t[..., plants.head_by_head(SimpleNamespace(H=3, K=3, D=12))]), "head by head instead of in thirds", False),
    ("persimmon", on("query_key", lambda t: t.unflatten(0, (3, 3, 12)).transpose(0, 1).reshape(t.shape)), "in thirds instead of head by head", False),
    ("gpt_neo", lambda state: {**state, "lm_head.weight": state["transformer.wte.weight"]}, "stored twice, equal to the token table", True),
    ("gpt_neo", lambda state: {n: t for n, t in state.items() if "ln_f" not in n}, "2 tensors are missing in the second", False),
    ("gpt_neo", lambda state: {**state, "transformer.h.7.ln_1.weight": torch.ones(48)}, "1 tensor is in the second only", False),
])  # fmt: skip
def test_two_checkpoints(kits, name, change, shown, equal, tmp_path):
    twins = checkpoints.apart(kits[name].folder, edited(kits[name], tmp_path / "other", change))
    assert shown in twins.sentence and twins.equal == equal, twins
    assert json.loads(json.dumps(twins.as_json()))["equal"] == equal


def test_joint_matrices_cut_otherwise_and_other_fields(kits, tmp_path):
    own = kits["persimmon"]

    def apart(state):
        found = {}
        for name, t in state.items():
            if "query_key_value" in name:
                parts = t.unflatten(0, (3, 3, 12)).unbind(1)
                found |= {
                    name.replace("query_key_value", f"{x}_proj"): p.flatten(0, 1)
                    for x, p in zip("qkv", parts, strict=True)
                }
            else:
                found[name] = t
        return found

    twins = checkpoints.apart(own.folder, edited(own, tmp_path / "a", apart))
    assert twins.equal and "4 tensors are cut into 3" in twins.sentence
    twins = checkpoints.apart(own.folder, edited(own, tmp_path / "b", dict, {"rope_theta": 10000.0}))
    assert (
        not twins.equal and "rope_theta is 25000.0 in the first and 10000.0 in the second" in twins.sentence
    )
    with pytest.raises(ValueError, match="nothing in common"):
        checkpoints.apart(own.folder, kits["phi"].folder)


def test_two_checkpoints_by_command(kits, capsys, tmp_path):
    own = kits["phi"]
    other = edited(own, tmp_path / "other", on("dense.weight", lambda t: t.t()))
    assert run_main(capsys, own.folder, own.folder)[0] == 0
    status, out, _ = run_main(capsys, own.folder, other)
    assert status == 1 and "model.layers.0-1.self_attn.dense.weight" in out


# ---- A checkpoint here and in Transformers -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-neo", "openai-gpt", "phi", "phi3", "persimmon", "fuyu"])
def test_real_weights_here_and_there(name, capsys):
    pytest.importorskip("transformers")
    folder = ROOT / "checkpoints" / f"tiny-{name}"
    status, out, _ = run_main(
        capsys, folder, "transformers", "--prompt", "Once upon a time", "--dtype", "bfloat16", "--sequential"
    )
    assert status == 0 and "x bfloat16 noise" in out, out


def test_a_wrong_checkpoint_is_named_on_a_prompt(tmp_path, monkeypatch):
    """As if Transformers had Persimmon's wrong base: what it reads has another than we read."""
    pytest.importorskip("transformers")
    folder = shutil.copytree(ROOT / "checkpoints" / "tiny-persimmon", tmp_path / "theirs")
    facts = json.loads((folder / "config.json").read_text())
    facts.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**facts, "rope_theta": 10000.0}))
    plain = ports.load_theirs
    monkeypatch.setattr(
        ports, "load_theirs", lambda module, name, _, dtype: plain(module, name, folder, dtype)
    )
    ids = list(range(40, 60))
    report = on_prompt(ROOT / "checkpoints" / "tiny-persimmon", ids)
    assert names(report) == ["rotary: base 10000"], report


# ---- docs/porting.md ---------------------------------------------------------------------------------------


FIXES = (  # of examples/port.py: what it says, and what is right
    ("triu(1)", "triu(past + 1)"),
    ("a, b = x[..., :R:2], x[..., 1:R:2]", "a, b = x[..., : R // 2], x[..., R // 2 : R]"),
    (
        "torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)",
        "torch.cat([a * cos - b * sin, a * sin + b * cos], -1)",
    ),
    ('F.gelu(linear(n, f"{layer}.mlp.fc1"))', 'F.gelu(linear(n, f"{layer}.mlp.fc1"), approximate="tanh")'),
    ('@ weights["lm_head.weight"].T', '@ weights["lm_head.weight"].T + weights["lm_head.bias"]'),
)


def test_the_story_of_the_documentation(kits, tmp_path):
    """Four mistakes: the logits alone do not tell them, with inner values all are named, then the last one."""
    page, port = (ROOT / "docs" / "porting.md").read_text(), ROOT / "examples" / "port.py"
    mended = tmp_path / "port.py"

    def shown(file, function, fixes=()):
        text = port.read_text()
        for wrong, right in fixes:
            assert text.count(wrong) == 1, wrong
            text = text.replace(wrong, right)
        mended.write_text(text)
        return compare.run(kits["phi"], f"{file}:{function}").text()

    for text in (shown(port, "build"), shown(port, "with_stages"), shown(mended, "with_stages", FIXES[1:])):
        for line in text.splitlines()[:3]:
            assert re.sub(r"[\d.]+(e\+\d+)?x", "x", line) in re.sub(r"[\d.]+(e\+\d+)?x", "x", page), line
    assert "computes what phi expects" in shown(mended, "with_stages", FIXES)
    for command in re.findall(r"^\$ python -m decoders compare kit (\S+):", page, re.M):
        assert (ROOT / command).exists(), command


def test_the_documentation_counts_the_mistakes():
    counts = [len(mistakes.of(family)) for family in draw.SMALL]
    shown = f"{min(counts)} to {max(counts)}"
    assert shown in (ROOT / "docs" / "porting.md").read_text() and shown in (ROOT / "README.md").read_text()
    assert "not decided" not in (ROOT / "docs" / "versions.md").read_text()


def test_links_of_the_documentation_exist():
    for target in re.findall(r"\]\(([\w/.-]+)\)", (ROOT / "docs" / "porting.md").read_text()):
        assert (ROOT / "docs" / target).exists(), target
