"""csrc/simt finds what a GPU is silent about, and says in which kernel, block and thread."""

import re

import pytest

SOURCE = "simt_broken.cpp"
LINE = r"simt_broken\.cpp:\d+"

THROWS = {
    "exit_before_barrier": r"block \(1,0,0\) thread \(0,0,0\): __syncthreads at "
    + LINE
    + r" is not reached by all: thread \(7,0,0\) has exited",
    "two_barriers": r"block \(0,0,0\) thread \(32,0,0\): __syncthreads at "
    + LINE
    + " is not reached by all: others wait in __syncthreads at "
    + LINE,
    "divergent_shuffle": r"block \(0,0,0\) thread \(0,0,0\): __shfl_xor_sync at "
    + LINE
    + r" is not reached by all: thread \(16,0,0\) has exited",
    "two_operations": r"block \(0,0,0\) thread \(16,0,0\): __syncwarp at "
    + LINE
    + r" meets thread \(0,0,0\) waits in __ballot_sync at "
    + LINE,
    "lane_not_in_mask": r"block \(0,0,0\) thread \(15,0,0\): __shfl_down_sync at "
    + LINE
    + " reads lane 16, which takes no part",
    "outside_its_mask": r"block \(0,0,0\) thread \(16,0,0\): __syncwarp at "
    + LINE
    + " is called by a lane outside its own mask",
    "too_many_threads": "invalid configuration argument",
}
BOUNDS = {  # what the sanitizer says, and where
    "past_static_shared": (r"insufficient space|global-buffer-overflow", "1,0,0", "63,0,0"),
    "past_dynamic_shared": ("heap-buffer-overflow", "0,0,0", "63,0,0"),
    "past_global": ("heap-buffer-overflow", "1,0,0", "31,0,0"),
    "past_local": (r"insufficient space|stack-buffer-overflow", "0,0,0", "63,0,0"),
    "misaligned": ("misaligned address", "0,0,0", "5,0,0"),
}
RACES = ["race", "race_through_shuffle", "race_on_global"]
RIGHT = ["fine", "warp_synchronous", "counts", "partial_warp"]


@pytest.mark.parametrize("name", THROWS)
def test_divergence_is_named(simt_run, name):
    done = simt_run(SOURCE, "address", name)
    assert done.returncode == 3, done.stdout
    assert re.search(f"threw {name} {THROWS[name]}|threw .*{THROWS[name]}", done.stdout), (
        done.stdout
    )


@pytest.mark.parametrize("name", BOUNDS)
def test_out_of_bounds_is_named(simt_run, name):
    said, block, thread = BOUNDS[name]
    done = simt_run(SOURCE, "address", name)
    assert done.returncode == 1, done.stdout
    assert re.search(said, done.stdout), done.stdout
    assert f"simt: in {name} block ({block}) thread ({thread})" in done.stdout


@pytest.mark.parametrize("name", RACES)
def test_race_is_named(simt_run, name):
    done = simt_run(SOURCE, "thread", name)
    assert done.returncode == 66, done.stdout
    assert "ThreadSanitizer: data race" in done.stdout
    assert len(set(re.findall(rf"'{name} block \(\d,0,0\) thread \(\d+,0,0\)'", done.stdout))) >= 2


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(simt_run, name, sanitizer):
    done = simt_run(SOURCE, sanitizer, name)
    assert done.returncode == 0, done.stdout
    # AddressSanitizer warns of swapcontext, once, in a line of its own.
    values = [float(v) for v in done.stdout.splitlines()[-1].split()]
    assert values == expected(name)


def expected(name: str) -> list[float]:
    blocks, threads = range(2), range(64)
    if name == "counts":
        return [128.0] + [0.0] * 127
    if name == "warp_synchronous":
        return [float(t // 32 * 32 + (t + 1) % 32) for _ in blocks for t in threads]
    if name == "partial_warp":  # 40 threads: each adds its neighbour in pairs
        return [float(t + (t ^ 1)) if t < 40 else 0.0 for _ in blocks for t in threads]
    out = []
    for block in blocks:
        v = [float(block * 64 + 63 - t) for t in threads]
        for by in (16, 8, 4, 2, 1):
            v = [v[t] + (v[t + by] if t % 32 + by < 32 else v[t]) for t in threads]
        out += v
    return out


def test_unwritten_shared_memory_is_nan(simt_run):
    values = simt_run(SOURCE, "address", "unwritten_shared").stdout.splitlines()[-1].split()
    wrong = [i for i, v in enumerate(values) if "nan" in v]
    assert wrong == [9, 64 + 9]
