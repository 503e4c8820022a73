"""The harness itself: its statistics, its order, its refusal to time what is wrong."""

import json
import math

import pytest
import torch

from fusedpeft.bench import ceilings, harness, report
from fusedpeft.bench.ceilings import Ceilings
from fusedpeft.bench.harness import BenchMismatch, Case, Clock, Expected, Impl

CPU = torch.device("cpu")


class FakeTime:
    """A clock that moves only when an implementation says so."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def make_case(costs_us, time, *, wrong=(), sets=1, seen=None):
    """Implementations that return ones(4) and cost what `costs_us[name]` yields, call by call."""
    ones = torch.ones(4, dtype=torch.float64)
    expected = Expected(("y",), (ones,), (ones.float(),))

    def impl(name, costs):
        def build(i):
            def call():
                if seen is not None:
                    seen.append((name, i))
                time.ns += int(next(costs) * 1000)
                return torch.full((4,), 2.0 if name in wrong else 1.0)

            return call

        return Impl(name, build, expected, flops=2e6, moved_bytes=1e6)

    impls = [impl(name, costs) for name, costs in costs_us.items()]
    return Case("op", "shape", torch.float32, CPU, impls, floor="floor", sets=sets)


def cycle(values):
    while True:
        yield from values


def run(case, time, **kwargs):
    return harness.run_case(case, seconds=0, clock=Clock(CPU, cold=True, now=time), **kwargs)


def test_median_and_percentiles_of_known_times():
    time = FakeTime()
    # check and peak take one call each, then three rounds of warm-up: five calls are not timed.
    ours = iter([500.0] * 5 + [10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    case = make_case({"ours": ours, "floor": cycle([25.0])}, time)
    got = {t.name: t for t in run(case, time, min_rounds=6)}
    assert got["ours"].rounds == 6
    assert got["ours"].median_us == pytest.approx(35.0)
    assert (got["ours"].p20_us, got["ours"].p80_us) == (pytest.approx(20.0), pytest.approx(50.0))
    assert got["floor"].median_us == pytest.approx(25.0)


def test_real_clock_agrees_with_real_time():
    import time as real

    def slow():
        end = real.perf_counter() + 0.002
        while real.perf_counter() < end:
            pass

    clock = Clock(CPU, cold=True)
    for _ in range(5):
        clock.call("x", slow)
    assert min(clock.times_us["x"]) >= 2000
    assert min(clock.times_us["x"]) < 4000


@pytest.mark.parametrize(
    "values, q, want", [([3.0], 0.2, 3.0), ([1.0, 2.0], 0.5, 1.5), ([0.0, 10.0, 20.0], 0.8, 16.0)]
)
def test_percentile(values, q, want):
    assert harness.percentile(values, q) == pytest.approx(want)


def test_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        harness.percentile([], 0.5)


def test_order_is_fair():
    names = ["a", "b", "c"]
    rounds = [harness.order(names, r) for r in range(6)]
    assert all(sorted(r) == names for r in rounds)
    for at in range(3):  # each place is held equally often by each
        assert sorted(r[at] for r in rounds) == ["a", "a", "b", "b", "c", "c"]


def test_every_call_takes_the_next_copy_of_the_weights():
    time, seen = FakeTime(), []
    case = make_case({"ours": cycle([1.0]), "floor": cycle([1.0])}, time, sets=5, seen=seen)
    run(case, time, min_rounds=10)
    timed = [i for _, i in seen[4:]]  # after the check and the peak of two implementations
    assert timed == [k % 5 for k in range(len(timed))]


def test_copies_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(harness, "l3_bytes", lambda: 32 << 20)
    assert harness.cold_sets(8 << 20, CPU) * (8 << 20) >= 2 * (32 << 20)
    assert harness.cold_sets(1 << 30, CPU) >= 2
    assert harness.cold_sets(8 << 20, torch.device("cuda")) == 1


def test_mismatch_aborts_before_anything_is_timed():
    time, seen = FakeTime(), []
    case = make_case(
        {"floor": cycle([1.0]), "ours": cycle([1.0])}, time, wrong=("ours",), seen=seen
    )
    with pytest.raises(BenchMismatch, match=r"ours\.y: \|got - ref64\| is 1\.000e\+00, allowed"):
        run(case, time)
    assert seen == [("floor", 0), ("ours", 0)]


@pytest.mark.parametrize(
    "got, message",
    [
        ((torch.full((4,), math.nan),), "got - ref64"),
        ((torch.ones(3),), r"expected torch.float32 \(4,\), got torch.float32 \(3,\)"),
        ((torch.ones(4, dtype=torch.float64),), "got torch.float64"),
        ((torch.ones(4), torch.ones(4)), "got 2 of them"),
    ],
)
def test_check_refuses(got, message):
    ones = torch.ones(4, dtype=torch.float64)
    with pytest.raises(BenchMismatch, match=message):
        harness.check("x", got, Expected(("y",), (ones,), (ones.float(),)))


def test_check_reports_the_relative_error():
    ref = torch.tensor([1.0, -4.0], dtype=torch.float64)
    low = torch.tensor([1.0, -4.001])
    error = harness.check("x", (torch.tensor([1.0, -4.0015]),), Expected(("y",), (ref,), (low,)))
    assert error == pytest.approx(0.0015 / 4, rel=1e-3)


def test_peak_bytes_counts_what_is_alive_at_once():
    def call():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        del a
        b = torch.empty(1 << 20, dtype=torch.uint8)
        c = torch.empty(1 << 19, dtype=torch.uint8)
        return b, c

    assert harness.peak_bytes(call, CPU) == (1 << 20) + (1 << 19)


def test_rows_have_exactly_the_promised_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDPEFT_COMMIT", "abc1234")
    time = FakeTime()
    case = make_case({"ours": cycle([50.0]), "floor": cycle([100.0])}, time)
    timings = run(case, time)
    rows = report.rows_of(case, timings, Ceilings(40.0, {torch.float32: 0.1}), report.commit())
    report.write_json(tmp_path / "rows.json", rows)
    ours, floor = json.loads((tmp_path / "rows.json").read_text())
    promised = (
        "op case impl dtype device median_us p20_us p80_us gb_per_s tflop_per_s pct_of_ceiling "
        "peak_bytes error commit"
    )
    assert set(ours) - {"ratio"} == set(promised.split())
    assert (ours["ratio"], floor["ratio"]) == (0.5, 1.0)
    # 1 MB in 50 µs, 2 MFLOP in 50 µs; at 40 GB/s and 0.1 TFLOP/s the bytes take 25 µs, the longer
    assert (ours["gb_per_s"], ours["tflop_per_s"]) == (20.0, 0.04)
    assert ours["pct_of_ceiling"] == pytest.approx(50.0)
    assert ours["commit"] == "abc1234" and ours["dtype"] == "fp32"
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.json"]


def test_a_cpu_multiplies_16_bits_at_least_as_fast_as_32(monkeypatch):
    """Where there is no unit for 16 bits one converts."""
    rates = {torch.float32: 2e12, torch.bfloat16: 1e9, torch.float16: 5e12}
    monkeypatch.setattr(ceilings, "_copy_s", lambda *args: 1.0)
    monkeypatch.setattr(ceilings, "_product_rate", lambda d, size, dtype, n: rates[dtype])
    got = ceilings.measure(torch.device("cpu"), [torch.bfloat16, torch.float16]).tflop_per_s
    assert got == {torch.bfloat16: 2.0, torch.float16: 5.0}


def test_a_peer_may_be_less_exact_than_ours():
    ref = torch.tensor([1.0, 2.0], dtype=torch.float64)
    expected = harness.Expected(("y",), (ref,), ((ref + 1e-4).float(),))
    got = ((ref + 5e-4).float(),)
    with pytest.raises(BenchMismatch, match=r"2 x torch's own error"):
        harness.check("ours", got, expected)
    assert harness.check("torch.compile", got, expected, peer=True) == pytest.approx(
        2.5e-4, rel=0.01
    )
    with pytest.raises(BenchMismatch, match=r"8 x torch's own error"):
        harness.check("peft", ((ref + 5e-3).float(),), expected, peer=True)


def test_every_bench_has_its_command():
    from fusedpeft.bench.cli import app
    from fusedpeft.bench.run import OPS

    assert {c.name for c in app.registered_commands} >= OPS.keys()
