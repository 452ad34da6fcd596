"""What the benchmarks decide by themselves: when a round begins, what is rounded, what a table says."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from bench import against, machine
from bench.page import digits
from bench.peers import folders, table
from bench.peers.engines import ENGINES
from decoders import decoding, gpt_neo, weights


def readings(monkeypatch, *seen: tuple[float, float]) -> machine.QuietMachine:
    """A watch that sees (cores of others, GB/s), one after the other; time passes by itself."""
    values, clock = iter(seen), iter(range(1000))
    current = [(0.0, 0.0)]

    def others() -> float:
        current[0] = next(values)
        return current[0][0]

    monkeypatch.setattr(machine, "others", others)
    monkeypatch.setattr(machine, "read_speed", lambda: current[0][1])
    monkeypatch.setattr(machine.time, "sleep", lambda _: None)
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    watch = machine.QuietMachine(machine.RESULTS.parent / "none.json")
    watch.best = 60.0
    return watch


def test_a_round_begins_when_nothing_else_runs_and_memory_is_read_fast(monkeypatch):
    watch = readings(monkeypatch, (1.0, 60.0), (0.0, 30.0), (0.02, 55.0))
    assert watch.wait(100) == (0.02, 55.0, 60.0)


def test_a_machine_that_does_not_become_quiet_ends_it(monkeypatch):
    watch = readings(monkeypatch, *[(2.0, 60.0)] * 20)
    with pytest.raises(SystemExit, match="not quiet after 5 s: others use 2.00 cores"):
        watch.wait(5)


def test_the_best_reading_is_the_best_so_far(monkeypatch):
    watch = readings(monkeypatch, (0.0, 80.0), (0.0, 60.0), (0.0, 70.0))
    assert watch.wait(100).best == 80.0
    assert watch.wait(100) == (0.0, 70.0, 80.0)  # 60 of 80 is not near enough


def test_gptq_parts_are_the_nearest_numbers():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    parts = folders.gptq_parts(w)
    words, shift = parts["qweight"].t().long() & 0xFFFFFFFF, torch.arange(0, 32, 4)
    q = (words[..., None] >> shift & 15).flatten(1)
    assert (parts["qzeros"].long() >> shift[:, None, None] & 15).eq(7).all()  # stored less one
    scale = parts["scales"].t().float().repeat_interleave(32, 1)
    assert ((q - 8) * scale - w).abs().le(scale / 2 * 1.01).all()


def test_each_engine_serves_a_model():
    for engine in ENGINES.values():
        assert engine.serves("phi-2") or engine.serves("gpt-neo-125m")
    assert not ENGINES["llama.cpp Q8_0"].serves("gpt-neo-125m")


def test_ours_is_compared_with_the_fastest_of_as_many_bits():
    def one(speed: float) -> dict:
        speeds = dict.fromkeys(table.SPEEDS, speed)
        return {**speeds, "first": 1.0, "memory": 1e9, "error": 0.1, "runs": 2}

    rates = {"ours bfloat16": 10.0, "ours int8": 24.0, "llama.cpp Q8_0": 20.0, "OpenVINO int8": 16.0}
    results = {engine: one(rate) for engine, rate in rates.items()}
    text = table.page({"phi-2": results}, ["others use 0.00 cores"])
    assert "| 8 bits | 1.20 | 1.20 | 1.20 |" in text
    assert "Round 1 began when others use 0.00 cores." in text


def test_medians_keep_the_order_of_the_engines():
    runs = {"llama.cpp Q8_0": [{"first": 1.0}], "ours int8": [{"first": 2.0}, {"first": 4.0}]}
    assert list(table.medians(runs).items()) == [
        ("ours int8", {"first": 3.0, "runs": 2}),
        ("llama.cpp Q8_0", {"first": 1.0, "runs": 1}),
    ]


def test_a_figure_that_only_some_rounds_have_is_the_median_of_these():
    runs = [{"decode 1900": 4.0, "prefill": 1.0}, {"prefill": 3.0}]
    assert table.median_of(runs) == {"decode 1900": 4.0, "prefill": 2.0}
    assert table.speed_cell({"prefill": 2.0}, {"prefill": 1.0}, "decode 1900") == "-"
    assert table.ratio_cell({"prefill": 2.0}, [{"prefill": 4.0}, {}], "prefill") == "0.50"
    assert table.ratio_cell({"prefill": 2.0}, [{}], "prefill") == "-"


@pytest.mark.parametrize(("options", "how"), [({}, "streamer"), ({"num_beams": 2}, "stopping_criteria")])
def test_the_clock_counts_from_the_first_token_to_the_last(monkeypatch, options, how):
    """A tick whenever it hears of a step. Of the prompt, which streamers alone hear of, nothing is counted."""
    ticks = chain([-1000] if how == "streamer" else [], range(1000))
    monkeypatch.setattr(against, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    clock, ids = against.Clock(), torch.tensor([[5, 6, 7]])
    heard = {how: clock if how == "streamer" else [clock]}
    model = weights.load(gpt_neo.GPTNeoForCausalLM, "checkpoints/tiny-gpt-neo")
    decoding.generate(model, ids, max_new_tokens=9, eos_token_id=None, pad_token_id=0, **heard, **options)
    assert len(clock.heard) == 9 + (how == "streamer")
    assert clock.rate() == 1.0


def test_numbers_of_tables_have_three_digits_and_no_exponent():
    assert [digits(x) for x in (0.12345, 8.3, 97.26, 1617.0, 4.56e6)] == [
        "0.123",
        "8.3",
        "97.3",
        "1,620",
        "4,560,000",
    ]
