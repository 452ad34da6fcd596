"""Mistakes with a number in them: drawn at random, planted, and told with the number."""

import itertools
import math
import random
import re
import statistics
import zlib
from typing import NamedTuple

import pytest
import torch

from decoders import compare
from decoders.compare import kit, mistakes
from decoders.compare import search as search_module
from decoders.compare.arithmetic import Arithmetic
from decoders.compare.draw import LIMIT, SMALL
from decoders.compare.fit import Fit
from decoders.compare.formula import Formula, stages
from decoders.compare.mistakes import Quantity
from decoders.compare.mistakes.numbers import with_error
from decoders.compare.search import Search
from decoders.compare.stagewise import off
from tests.conftest import ROOT

RESULTS = ("logits", "loss")
CLOSE = 0.01  # of the number
# What shows nothing but in the loss or with a cache is looked for in all cases; the others by their first stage.
BOUNDS = {"norm: epsilon": (1e-7, 0.03), "rotary: base": (30.0, 1e7), "logits: capped by tanh at": (0.1, 30.0),
          "attention: scores capped by tanh at": (0.1, 10.0), "attention: q, k and v clamped at": (0.1, 2.0)}  # fmt: skip

TABLE = {  # values that have a name of their own among the known mistakes
    "loss: labels shifted by": lambda f: (0, 2),
    "attention: the window is": lambda f: (
        [max(w or 0 for w in f.windows) + n for n in (-1, 1)] + [*range(LIMIT + 1, 21)]
    ),
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


def computed(own: kit.Kit, *wrong: mistakes.Mistake, only=None, dtype: str = "float32", seed=11) -> dict:
    """`CASE/STAGE` of a port with these mistakes, its sums in another order."""
    lowered = {name: w.to(getattr(torch, dtype)) for name, w in own.weights.items()}
    return {
        f"{case}/{name}": value
        for case, given in own.inputs.items()
        for name, value in stages(own.config, lowered, given, mistakes=wrong, do=Arithmetic(seed)).items()
        if (only is None or name in only) and name in own.expected[case]
    }


def is_named(report: compare.Report, quantity: Quantity, value: float) -> bool:
    """First, alone, and with the number to 1 %."""
    shown = [m for finding in report.findings for m in finding.mistakes]
    return (
        len(shown) == 1
        and shown[0].quantity is quantity
        and abs(shown[0].number - value) <= CLOSE * abs(value)
    )


def shows(own: kit.Kit, mistake: mistakes.Mistake) -> bool:
    """A label shift of 1 or a window as long as the text is no mistake here."""
    return not compare.run(own, computed(own, mistake, only=RESULTS), names=False).equal


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
        report, count = compare.run(own, computed(own, mistake, only=only)), count + 1
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
    assert shown.name.startswith("rotary: base"), report
    assert abs(shown.number - 39811) <= shown.error < 4000, report


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
    assert abs(shown["value"] - 39811) <= shown["error"] < 1


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
    report = compare.run(own, computed(own, base.mistake(f, 39811.0), only=RESULTS))
    assert report.findings and next(count) < 5000


# ---- How far a number may be off ---------------------------------------------------------------------------


def search_of(own: kit.Kit, values: dict, dtype: str = "float32") -> Search:
    """As `compare.run` begins it."""
    rows = compare.run(own, values, dtype=dtype, names=False).rows
    cases: dict[str, dict] = {}
    for name, value in values.items():
        case, _, stage = name.partition("/")
        cases.setdefault(case, {})[stage] = value.double()
    return Search(own, cases, rows, dtype)


class Interval(NamedTuple):
    name: str
    true: float
    printed: float
    error: float  # as it is printed
    independent: float  # what it would be if every number had noise of its own

    @property
    def off(self) -> float:
        return abs(self.printed - self.true)


def interval(
    own: kit.Kit, quantity: Quantity, value: float, seed: int, dtype: str, only: tuple | None
) -> Interval | None:
    """What is printed of a port that has this value; None if it has no such mistake, or it changes nothing."""
    mistake = quantity.mistake(Formula(own.config, {}), value)
    search = search_of(own, computed(own, mistake, only=only, dtype=dtype, seed=seed), dtype)
    fit = Fit(search, (mistake,), search.given_stages())
    fit.improve()
    given = fit.with_errors()
    if given is None or not any(row.mark == "x" for row in search.rows):
        return None
    shown, error = re.findall(r"([-\d.,e+]+) \+- ([\d.,e+-]+) ", given[0].name)[0]
    deviations = fit.deviations()[:, 0]
    independent = given[0].error * (deviations[0] / deviations.max()).item()
    return Interval(
        quantity.name, value, float(shown.replace(",", "")), float(error.replace(",", "")), independent
    )


def intervals(own: kit.Kit, every: int, dtype: str, only: tuple | None) -> list[Interval]:
    """Of every so manyth quantity, others for each kind of port."""
    found = []
    f, kind = Formula(own.config, {}), f"{own.family} {dtype} {only}"
    known = [quantity for quantity in mistakes.quantities_of(own.family) if quantity.moves]
    for quantity in known[zlib.crc32(kind.encode()) % every :: every]:
        rng = random.Random(f"{quantity.name} {kind}")
        value = drawn(quantity, f, rng)
        if value is not None:
            found.append(interval(own, quantity, value, rng.randrange(20, 1000), dtype, only))
    return [one for one in found if one is not None]


@pytest.mark.parametrize(
    ("every", "compact"),
    [
        pytest.param(9, True, id="some"),
        pytest.param(1, True, id="all, ready kits", marks=pytest.mark.pairs),
        pytest.param(1, False, id="all", marks=pytest.mark.pairs),
    ],
)
def test_the_true_number_lies_within_what_is_printed(kits, every, compact):
    """In 90 of 100 ports of all kinds at least, where independent noise would promise it in vain."""
    found = []
    for name in SMALL:
        own = kit.Kit(ROOT / "kits" / name) if compact else kits(name)
        for dtype, only in itertools.product(("float32", "bfloat16"), (None, RESULTS)):
            found += intervals(own, every, dtype, only)
    assert len(found) > 250 / every and len({one.name for one in found}) >= 10
    held = [one.off <= one.error for one in found]
    assert statistics.mean(held) >= 0.9, [one for one in found if one.off > one.error]
    assert statistics.median(one.off / one.error for one in found) > 0.1  # of a normal distribution 0.34
    assert statistics.mean(one.off <= one.independent for one in found) < 0.75


@pytest.mark.parametrize(("value", "error", "shown"), [
    (39811.04, 60, "39,810 +- 70"), (39811.004, 0.0349, "39,811.00 +- 0.04"), (0.9, 0, "0.90000000 +- 9e-08"),
    (3.0204e-6, 1.23e-8, "3.020e-06 +- 1.3e-08"), (0, 0.002, "0.0000 +- 0.0020"), (4.5e7, 3200, "4.5000e+07 +- 4,000"),
])  # fmt: skip
def test_what_is_printed_holds_what_is_meant(value, error, shown):
    written = with_error(value, error)
    assert written == shown
    a, _, b = written.replace(",", "").partition(" +- ")
    assert float(a) - float(b) <= value - error and value + error <= float(a) + float(b), written
    assert float(b) <= 1.5 * max(error, 1e-7 * value), written


# ---- Beside another mistake --------------------------------------------------------------------------------


def two_mistakes(own: kit.Kit, rng: random.Random) -> tuple[mistakes.Mistake, mistakes.Mistake] | None:
    """A number and another, or one of the table, that show in stages of two kinds, whatever the other is."""
    f = Formula(own.config, {})
    chosen = []
    for source in rng.choice([("numbers", "numbers"), ("numbers", "table")]):
        if source == "table":
            chosen.append(rng.choice([m for m in mistakes.of(own.family) if not m.half and not m.rounds]))
        else:
            quantity = rng.choice(mistakes.quantities_of(own.family))
            value = drawn(quantity, f, rng)
            if value is None:
                return None
            chosen.append(quantity.mistake(f, value))
    a, b = chosen
    if a.quantity is b.quantity:
        return None
    try:
        search = search_of(own, computed(own, a, b))
        wrong = [{stage.rpartition(".")[2] for _, stage in off(search, (m,))} for m in chosen]
    except IndexError:  # a wrong position behind the table's end
        return None
    return (a, b) if all(wrong) and not wrong[0] & wrong[1] else None


def are_named(report: compare.Report, *wrong: mistakes.Mistake) -> bool:
    """All of them and no other, with numbers to 1 %."""
    shown = [m for finding in report.findings for m in finding.mistakes]

    def same(a: mistakes.Mistake, b: mistakes.Mistake) -> bool:
        if b.number is None:
            return a.name == b.name
        return a.quantity is b.quantity and abs(a.number - b.number) <= CLOSE * abs(b.number)

    return len(shown) == len(wrong) and all(any(same(a, b) for a in shown) for b in wrong)


@pytest.mark.parametrize(
    ("families", "draws"),
    [
        pytest.param(("phi", "gpt_neo"), 1, id="some"),
        pytest.param(tuple(SMALL), 12, id="many", marks=pytest.mark.pairs),
    ],
)
def test_a_number_is_told_beside_another_mistake(kits, families, draws):
    """With inner values, where each shows in stages of its own: both in 90 of 100."""
    wrong, count = [], 0
    for name in families:
        rng = random.Random(f"pairs {name}")
        pairs = itertools.islice(filter(None, (two_mistakes(kits(name), rng) for _ in range(1000))), draws)
        for pair in pairs:
            report, count = compare.run(kits(name), computed(kits(name), *pair)), count + 1
            if not are_named(report, *pair):
                wrong.append((name, [m.name for m in pair], str(report.findings)))
    assert count == draws * len(families) and len(wrong) <= 0.1 * count, wrong


def test_mistakes_are_told_in_the_order_of_their_stages(kits):
    own = kits("phi")
    f = Formula(own.config, {})
    base, eps = (
        next(q for q in mistakes.QUANTITIES if q.name == name) for name in ("rotary: base", "norm: epsilon")
    )
    biasless = next(m for m in mistakes.of("phi") if m.name == "bias of the logits missing")
    values = computed(own, biasless, base.mistake(f, 23456.0), eps.mistake(f, 3e-4))
    report = compare.run(own, values)
    names = [m.name.partition(" ")[0] for m in report.findings[0].mistakes]
    assert names == ["norm:", "rotary:", "bias"], report


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
