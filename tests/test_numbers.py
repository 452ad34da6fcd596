"""Mistakes with a number in them: drawn at random, planted, and told with the number."""

import itertools
import math
import random
import zlib

import pytest
import torch

from decoders import compare
from decoders.compare import kit, mistakes
from decoders.compare import search as search_module
from decoders.compare.arithmetic import Arithmetic
from decoders.compare.formula import Formula, stages
from decoders.compare.mistakes import Quantity

RESULTS = ("logits", "loss")
CLOSE = 0.01  # of the number
# What shows nothing but in the loss or with a cache is looked for in all cases; the others by their first stage.
BOUNDS = {"norm: epsilon": (1e-7, 0.03), "rotary: base": (30.0, 1e7), "logits: capped by tanh at": (0.1, 30.0),
          "attention: scores capped by tanh at": (0.1, 10.0), "attention: q, k and v clamped at": (0.1, 2.0)}  # fmt: skip

TABLE = {  # values that have a name of their own among the known mistakes
    "loss: labels shifted by": lambda f: (0, 2),
    "attention: the window is": lambda f: [max(w or 0 for w in f.windows) + n for n in (-1, 1)],
    "positions: the first is": lambda f: (1, 2),
    "positions: with a cache they are off by": lambda f: (-8,),
    "rotary: dimensions that are rotated:": lambda f: (f.R - 2, f.D),
}


@pytest.fixture(scope="session")
def kits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits")
    made: dict[str, kit.Kit] = {}

    def of(family: str) -> kit.Kit:
        if family not in made:
            made[family] = kit.Kit(kit.make(folder / family, family))
        return made[family]

    return of


def drawn(quantity: Quantity, f: Formula, rng: random.Random) -> float | None:
    """A value that a port may have: away from the right one by 2 % at least; None if this model has none."""
    right = quantity.right(f)
    low, high = BOUNDS.get(quantity.name, (quantity.low, quantity.high))
    if right is None and quantity.name.startswith(("activation", "longrope", "attention: the window")):
        return None
    while True:
        if quantity.grid == "whole":
            value = rng.choice(quantity.guesses(f))
        elif quantity.grid == "linear":
            value = rng.uniform(low, high)
        else:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
        known = TABLE.get(quantity.name, lambda f: ())(f)
        if value not in known and (right is None or abs(value - right) > 0.02 * max(abs(right), 0.01)):
            return value


def computed(own: kit.Kit, mistake: mistakes.Mistake, only=None, dtype: str = "float32") -> dict:
    """`CASE/STAGE` of a port with this mistake, its sums in another order."""
    lowered = {name: w.to(getattr(torch, dtype)) for name, w in own.weights.items()}
    return {
        f"{case}/{name}": value
        for case, given in own.inputs.items()
        for name, value in stages(own.config, lowered, given, mistakes=(mistake,), do=Arithmetic(11)).items()
        if only is None or name in only
    }


def is_named(report: compare.Report, quantity: Quantity, value: float) -> bool:
    """First, alone, and with the number to 1 %."""
    shown = [m for finding in report.findings for m in finding.mistakes]
    return (
        len(shown) == 1
        and shown[0].name.startswith(quantity.name)
        and abs(shown[0].number - value) <= CLOSE * abs(value)
    )


def shows(own: kit.Kit, mistake: mistakes.Mistake) -> bool:
    """A label shift of 1 or a window as long as the text is no mistake here."""
    return not compare.run(own, computed(own, mistake, RESULTS), names=False).equal


@pytest.mark.parametrize(
    ("every", "draws"),
    [
        pytest.param(25, 1, id="some", marks=pytest.mark.proof),
        pytest.param(1, 3, id="all", marks=pytest.mark.pairs),
    ],
)
@pytest.mark.parametrize(("only", "share"), [(None, 0.95), (RESULTS, 0.85)], ids=["inner values", "logits"])
def test_a_number_drawn_at_random_is_told(kits, family, only, share, every, draws):
    """Named first, to 1 %, in 95 % with inner values and in 85 % by logits and loss alone."""
    own, known = kits(family.name), mistakes.quantities_of(family.name)
    f, start = Formula(own.config, {}), (0 if only else 4) + zlib.crc32(family.name.encode()) % 4
    wrong, count = [], 0
    for draw, quantity in itertools.product(range(draws), known[start % every :: every]):
        value = drawn(quantity, f, random.Random(f"{quantity.name} {draw} {family.name}"))
        if value is None or not shows(own, mistake := quantity.mistake(f, value)):
            continue
        report, count = compare.run(own, computed(own, mistake, only)), count + 1
        if not is_named(report, quantity, value):
            wrong.append((quantity.name, value, report.findings))
    assert count and len(wrong) <= (1 - share) * count, wrong


@pytest.mark.proof
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_number_is_told_of_a_port_in_half_precision(kits, dtype):
    own = kits("phi")
    f, base = Formula(own.config, {}), next(q for q in mistakes.QUANTITIES if q.name == "rotary: base")
    report = compare.run(own, computed(own, base.mistake(f, 39811.0), dtype=dtype), dtype=dtype)
    shown = report.findings[0].mistakes[0]
    assert shown.name.startswith("rotary: base") and abs(shown.number - 39811) < max(3 * shown.error, 400), (
        report
    )


def test_a_number_is_told_of_a_module(kits):
    """Seen by hooks, planted as another field of the config."""
    own = kits("phi")
    config = own.model_class.config_class.from_dict({**own.config_json, "rope_theta": 39811.0})
    model = own.model_class(config).eval()
    model.load_state_dict(own.weights)
    report = compare.run(own, model)
    assert [m.name.partition(" +-")[0][:17] for m in report.findings[0].mistakes] == ["rotary: base 39,8"]
    assert "where this model has 10,000" in str(report) and "take 10,000" in str(report)
    shown = report.as_json()["mistakes"][0]["numbers"][0]
    assert abs(shown["value"] - 39811) <= 5 * shown["error"] < 40


def test_at_least_fifteen_numbers_are_known_of_every_family(family):
    f = Formula(family.model().config, {})
    known = [q for q in mistakes.quantities_of(family.name) if drawn(q, f, random.Random(0)) is not None]
    assert len(known) >= 15 and len({q.name for q in known}) == len(known)


def test_the_right_number_changes_nothing(kits, family):
    """So that what is told beside it, "where this model has", is true."""
    own = kits(family.name)
    f, inputs = Formula(own.config, {}), own.inputs["plain"]
    right = stages(own.config, own.weights64, inputs)
    for quantity in mistakes.quantities_of(family.name):
        if (value := quantity.right(f)) is not None:
            same = stages(own.config, own.weights64, inputs, mistakes=(quantity.mistake(f, value),))
            for name, expected in right.items():
                torch.testing.assert_close(same[name], expected, atol=1e-9, rtol=1e-9, equal_nan=True)


@pytest.mark.proof
def test_another_mistake_gets_no_number(kits):
    """A number that explains half of it is worse than none: here a head is silent, and the base another."""
    own = kits("phi")
    config = own.model_class.config_class.from_dict({**own.config_json, "rope_theta": 39811.0})
    model = own.model_class(config).eval()
    state = dict(own.weights)
    name = "model.layers.1.self_attn.dense.weight"
    state[name] = state[name].clone()
    state[name][:, :12] = 0
    model.load_state_dict(state)
    values = {}
    for case in ("plain", "positions"):
        given = {key: value for key, value in own.inputs[case].items() if key != "labels"}
        values[f"{case}/logits"] = model(**given).logits.detach()
    assert not compare.run(own, values).findings


@pytest.mark.proof
def test_the_work_of_a_search_is_bounded(kits, monkeypatch):
    """A pass of a kit's case takes 4 ms: so many are 20 seconds."""
    own, count = kits("phi3"), itertools.count()
    plain = search_module.stages

    def counted(*args, **kwargs):
        next(count)
        return plain(*args, **kwargs)

    monkeypatch.setattr(search_module, "stages", counted)
    f, base = Formula(own.config, {}), next(q for q in mistakes.QUANTITIES if q.name == "rotary: base")
    report = compare.run(own, computed(own, base.mistake(f, 39811.0), RESULTS))
    assert report.findings and next(count) < 5000


# ---- Dropout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.13, 0.5])
@pytest.mark.parametrize("name", ["gpt_neo", "phi3", "persimmon"])
def test_active_dropout_is_told_with_its_rate(kits, name, rate):
    own = kits(name)
    draw = torch.Generator().manual_seed(3)

    def drop(stage: str, value: torch.Tensor) -> torch.Tensor | None:
        if not stage.endswith((".attn_out", ".mlp_out")):
            return None
        kept = torch.rand(value.shape, generator=draw) >= rate
        return value * kept / (1 - rate)

    values = {}
    for case, given in own.inputs.items():
        seen: dict[str, torch.Tensor] = {}

        def note(stage: str, value: torch.Tensor, seen=seen) -> torch.Tensor:
            other = drop(stage, value)
            seen[stage] = value if other is None else other
            return seen[stage]

        stages(own.config, own.weights, given, note=note)
        values |= {f"{case}/{stage}": value for stage, value in seen.items()}
    report = compare.run(own, values)
    shown = report.findings[0].mistakes[0]
    assert shown.name.startswith("dropout: active") and abs(shown.number - rate) < 0.01 * rate, report


@pytest.mark.parametrize("name", ["gpt_neo", "phi3"])
def test_no_number_is_told_of_a_right_port(kits, name):
    own = kits(name)
    for seed in range(3):
        port = stages(own.config, own.weights, own.inputs["plain"], do=Arithmetic(50 + seed))
        report = compare.run(own, {f"plain/{name}": value for name, value in port.items()})
        assert report.equal and not report.findings
