"""Times several implementations of one case in turns, each proven right before it is timed.

One case goes: build `sets` copies of the weights, build every implementation over every copy, check
each against float64, warm up, then rounds. A round calls every implementation once; the order is
rotated by one each round and reversed every other one, so that nobody always follows the same
neighbour. Cold cache: on a CPU every call takes the next copy of the weights, and the copies
together exceed twice the last-level cache, as the layers of a model do in decode; on CUDA a buffer
of several times the L2 is overwritten before each call. Times: perf_counter_ns around a call on a
CPU, events around it on CUDA. Reported: the median with the 20th and 80th percentile.

Whole models stand `apart` on a CPU, each in a process of its own, where it is timed in turns with
the others all the same: in one process they share an allocator, and what one has freed decides
whether the next one's memory comes from the system anew, page by page.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fusedpeft.bench.errors import BenchMismatch

Outputs = tuple[Tensor, ...]
Call = Callable[[], object]
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU named in this project
DEFAULT_L3_BYTES = 32 << 20
SLOW_ROUND_S = 1.0
PEERS = ("torch.compile", "peft", "liger", "quack", "unsloth")


@dataclass(frozen=True)
class Expected:
    """What a group of implementations must compute, in float64, and how far they may be off.

    `low` is plain torch in the case's own dtype: ours may be off by twice what that is (and one
    unit in the last place of the largest value), a peer, whose error the table shows, by eight.
    """

    names: tuple[str, ...]
    ref: Outputs
    low: Outputs


@dataclass(frozen=True)
class Impl:
    """One contestant. `build(i)` returns the call over the i-th copy of the weights.

    The call returns what `expected` names: a Tensor or a tuple. `flops` and `moved_bytes` are what
    its own task needs at least (a frozen linear needs less than a LoRA one); the ceiling's
    percentage is taken against them. graph: on CUDA it is timed as a graph, as decode is run.
    """

    name: str
    build: Callable[[int], Call]
    expected: Expected
    flops: float
    moved_bytes: float
    graph: bool = False


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    dtype: torch.dtype
    device: torch.device
    impls: list[Impl]
    floor: str  # the implementation that `ratio` is taken against
    sets: int = 1
    grad: bool = False  # recorded for autograd, or run as under torch.no_grad()
    missing: dict[str, str] = field(default_factory=dict)  # peer -> why it is not here
    # name -> its call, to be pickled: on a CPU each contestant is timed in a process of its own.
    apart: Callable[[str], Call] | None = None


@dataclass(frozen=True)
class Timing:
    name: str
    median_us: float
    p20_us: float
    p80_us: float
    peak_bytes: int
    error: float
    rounds: int


def percentile(sorted_values: list[float], q: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default."""
    if not sorted_values:
        raise ValueError("percentile: expected at least one value, got none")
    at = (len(sorted_values) - 1) * q
    low, high = math.floor(at), math.ceil(at)
    return sorted_values[low] + (sorted_values[high] - sorted_values[low]) * (at - low)


def l3_bytes() -> int:
    """Size of the last-level cache that Linux reports; 32 MiB where it reports none."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not path.is_file():
        return DEFAULT_L3_BYTES
    text = path.read_text().strip()
    return int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)


def cold_sets(set_bytes: int, device: torch.device) -> int:
    """Copies of the weights that make every CPU call read them from memory; 1 on CUDA (flushed)."""
    if device.type == "cuda":
        return 1
    return min(256, math.ceil(2 * l3_bytes() / max(set_bytes, 1)) + 1)


def as_outputs(value: object) -> Outputs:
    return value if isinstance(value, tuple) else (value,)  # type: ignore[return-value]


def check(name: str, got: Outputs, expected: Expected, peer: bool = False) -> float:
    """Largest error over the outputs, relative to the largest reference value of that output.

    Raises BenchMismatch, with the figures, where |got − ref| > 2·|low − ref| + eps·max|ref|; of a
    peer 8·|low − ref|.
    """
    if len(got) != len(expected.ref):
        raise BenchMismatch(f"{name}: expected outputs {expected.names}, got {len(got)} of them")
    worst, times = 0.0, 8 if peer else 2
    for label, out, ref, low in zip(expected.names, got, expected.ref, expected.low, strict=True):
        if out.shape != ref.shape or out.dtype != low.dtype:
            raise BenchMismatch(
                f"{name}.{label}: expected {low.dtype} {tuple(ref.shape)}, "
                f"got {out.dtype} {tuple(out.shape)}"
            )
        size = ref.abs().max().clamp(min=1e-30)
        error = (out.double() - ref).abs().max()
        allowed = times * (low.double() - ref).abs().max() + torch.finfo(low.dtype).eps * size
        if not error <= allowed:  # so that NaN fails too
            raise BenchMismatch(
                f"{name}.{label}: |got - ref64| is {error.item():.3e}, allowed {allowed.item():.3e}"
                f" ({times} x torch's own error + eps); largest value {size.item():.3e}"
            )
        worst = max(worst, (error / size).item())
    return worst


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes alive at once that one call took from torch's allocator, beyond what was there.

    CUDA: max_memory_allocated. CPU: the profiler's record of every allocation and release, summed
    in order; scratch that a BLAS or a C++ kernel takes from malloc by itself is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Before the first profile: torch 2.13 otherwise reports each start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        result = call()
        del result
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def captured(call: Call) -> Call:
    """The call as a CUDA graph; replaying it returns the same outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles, and sets up what is kept from call to call
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


class Apart:
    """A contestant in a process of its own; calling it returns the nanoseconds that a call took."""

    def __init__(self, build: Callable[[str], Call], name: str, grad: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        args = (theirs, build, name, grad, torch.get_num_threads())
        self.process = context.Process(target=_time_on_request, args=args, daemon=True)
        self.process.start()
        theirs.close()

    def wait(self) -> int:
        """Until it is built, for 0, or what a call took."""
        try:
            return self.conn.recv()
        except (EOFError, OSError):
            raise RuntimeError("bench: a contestant's process ended; see above") from None

    def __call__(self) -> int:
        self.conn.send(None)
        return self.wait()

    def close(self) -> None:
        self.conn.close()
        self.process.join()


def _time_on_request(conn, build: Callable[[str], Call], name: str, grad: bool, threads: int):
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    with torch.set_grad_enabled(grad):
        call = build(name)
        gc.collect()
        gc.disable()
        conn.send(0)
        while True:
            try:
                conn.recv()
            except EOFError:
                return
            start = time.perf_counter_ns()
            result = call()
            stop = time.perf_counter_ns()
            del result
            conn.send(stop - start)


class Clock:
    """Times single calls on one device; `now` replaces the CPU's clock in tests."""

    def __init__(
        self, device: torch.device, cold: bool, now: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        self.device, self.now = device, now
        self.cuda = device.type == "cuda"
        self.flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
            if self.cuda and cold
            else None
        )
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.times_us: dict[str, list[float]] = {}

    def call(self, name: str, fn: Call) -> None:
        if isinstance(fn, Apart):
            self.times_us.setdefault(name, []).append(fn() / 1e3)
            return
        if not self.cuda:
            start = self.now()
            result = fn()
            stop = self.now()
            del result  # freed after the clock stopped, for everyone alike
            self.times_us.setdefault(name, []).append((stop - start) / 1e3)
            return
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.flush is not None:
            self.flush.zero_()
        start.record()
        fn()
        stop.record()
        self.pending.append((name, start, stop))

    def collect(self) -> None:
        """After each round: reads the events of CUDA, which asks for one synchronisation."""
        if self.pending:
            torch.cuda.synchronize(self.device)
            for name, start, stop in self.pending:
                self.times_us.setdefault(name, []).append(start.elapsed_time(stop) * 1e3)
            self.pending.clear()


def order(names: list[str], round_: int) -> list[str]:
    """Rotated by one each round, and reversed every other one."""
    at = (round_ // 2) % len(names)
    turned = names[at:] + names[:at]
    return turned[::-1] if round_ % 2 else turned


def run_case(
    case: Case, *, seconds: float = 1.0, min_rounds: int = 16, clock: Clock | None = None
) -> list[Timing]:
    """Checks, then times every implementation of a case; about `seconds` of rounds, in turns.

    At least `min_rounds`; 4, after one to warm up, where a single round takes more than a second
    (16-bit products that a CPU multiplies one by one).
    """
    with torch.set_grad_enabled(case.grad):
        return _run_case(case, seconds, min_rounds, clock or Clock(case.device, cold=True))


def _run_case(case: Case, seconds: float, min_rounds: int, clock: Clock) -> list[Timing]:
    calls: dict[str, list[Call]] = {}
    errors: dict[str, float] = {}
    eager: dict[str, Call] = {}
    for impl in case.impls:
        made = [impl.build(i) for i in range(case.sets)]
        eager[impl.name] = made[0]
        as_graph = impl.graph and case.device.type == "cuda"
        calls[impl.name] = [captured(call) for call in made] if as_graph else made
        label, got = f"{case.op} {case.name} {impl.name}", as_outputs(calls[impl.name][0]())
        errors[impl.name] = check(label, got, impl.expected, peer=impl.name in PEERS)
    names = [impl.name for impl in case.impls]
    peaks = {n: peak_bytes(eager[n], case.device) for n in names}
    apart = case.apart if case.device.type == "cpu" else None
    turn = 0

    def one_round(round_: int) -> None:
        nonlocal turn
        for name in order(names, round_):
            clock.call(name, calls[name][turn % case.sets])
            turn += 1
        clock.collect()

    was_enabled = gc.isenabled()
    gc.disable()
    processes = {} if apart is None else {n: Apart(apart, n, case.grad) for n in names}
    try:
        for name, process in processes.items():  # they are built side by side
            process.wait()
            calls[name] = [process] * case.sets
        start = time.perf_counter()
        one_round(0)
        if time.perf_counter() - start > SLOW_ROUND_S:
            min_rounds = min(min_rounds, 4)
        else:
            one_round(1)
            one_round(2)
        clock.times_us.clear()
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < min_rounds or time.perf_counter() < end:
            one_round(rounds)
            rounds += 1
    finally:
        if was_enabled:
            gc.enable()
        for process in processes.values():
            process.close()
    result = []
    for name in names:
        taken = sorted(clock.times_us[name])
        p20, p50, p80 = (percentile(taken, q) for q in (0.2, 0.5, 0.8))
        result.append(Timing(name, p50, p20, p80, peaks[name], errors[name], rounds))
    return result
