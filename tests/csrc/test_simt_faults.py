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
    "divergent_mma": r"block \(0,0,0\) thread \(32,0,0\): mma at "
    + LINE
    + r" is not reached by all: thread \(40,0,0\) has exited",
    "mma_of_half_a_warp": r"block \(0,0,0\) thread \(32,0,0\): mma at " + LINE + " needs 32 lanes",
    "copy_never_waited": r"block \(0,0,0\) thread \(0,0,0\): cp_async16 at "
    + LINE
    + " is waited for by nobody: the thread has exited",
    "copy_to_global": r"block \(0,0,0\) thread \(0,0,0\): cp_async16 at "
    + LINE
    + " is given an address outside the block's shared memory",
    "copy_to_the_middle": r"block \(0,0,0\) thread \(0,0,0\): cp_async16 at "
    + LINE
    + " is given an address in shared memory that is no multiple of 16",
    "copy_from_the_middle": r"block \(0,0,0\) thread \(0,0,0\): cp_async16 at "
    + LINE
    + " reads at an address that is no multiple of 16",
    "flag_of_a_later_block": r"block \(0,0,0\) thread \(3,0,0\): __nanosleep at "
    r"device\.h:\d+ waits for what nobody brings",
    "flag_of_its_own_block": r"block \(0,0,0\) thread \(3,0,0\): __nanosleep at "
    r"device\.h:\d+ waits for what nobody brings",
    "too_many_threads": "invalid configuration argument",
}
KERNELS = {  # where a case is not named as its kernel
    "too_many_threads": "fine",
    "copy_past_global": "copy_to",
    "copy_to_global": "copy_to",
    "copy_to_the_middle": "copy_to",
    "copy_from_the_middle": "copy_to",
    "copy_twice": "copy_to",
    "flag_of_a_later_block": "flag",
    "flag_of_its_own_block": "flag",
}
BOUNDS = {  # what the sanitizer says, and where
    "past_static_shared": (r"insufficient space|global-buffer-overflow", "1,0,0", "63,0,0"),
    "past_dynamic_shared": ("heap-buffer-overflow", "0,0,0", "63,0,0"),
    "past_global": ("heap-buffer-overflow", "1,0,0", "31,0,0"),
    "past_local": (r"insufficient space|stack-buffer-overflow", "0,0,0", "63,0,0"),
    "misaligned": ("misaligned address", "0,0,0", "5,0,0"),
    "copy_read_at_once": ("use-after-poison", "0,0,0", "63,0,0"),
    "copy_read_early": ("use-after-poison", "0,0,0", "63,0,0"),
    "copy_past_global": ("heap-buffer-overflow", "0,0,0", "56,0,0"),
}
RACES = ["race", "race_through_shuffle", "race_on_global", "copy_no_barrier", "copy_over_readers"]
RACES += ["copy_twice"]
RIGHT = ["fine", "warp_synchronous", "counts", "partial_warp", "product_fp16", "product_bf16"]
RIGHT += ["copies", "flag_of_an_earlier_block", "flags_in_a_block"]


@pytest.mark.parametrize("name", THROWS)
def test_divergence_is_named(simt_run, name):
    done = simt_run(SOURCE, "address", name)
    assert done.returncode == 3, done.stdout
    kernel = KERNELS.get(name, name)
    assert re.search(f"threw {kernel}:? {THROWS[name]}", done.stdout), done.stdout


@pytest.mark.parametrize("name", BOUNDS)
def test_out_of_bounds_is_named(simt_run, name):
    said, block, thread = BOUNDS[name]
    done = simt_run(SOURCE, "address", name)
    assert done.returncode == 1, done.stdout
    assert re.search(said, done.stdout), done.stdout
    assert f"simt: in {KERNELS.get(name, name)} block ({block}) thread ({thread})" in done.stdout


@pytest.mark.parametrize("name", RACES)
def test_race_is_named(simt_run, name):
    done = simt_run(SOURCE, "thread", name)
    assert done.returncode == 66, done.stdout
    assert "ThreadSanitizer: data race" in done.stdout
    kernel = KERNELS.get(name, name)
    assert (
        len(set(re.findall(rf"'{kernel} block \(\d,0,0\) thread \(\d+,0,0\)'", done.stdout))) >= 2
    )


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
    if name.startswith("product"):
        a = [[(i * 16 + k) % 127 for k in range(16)] for i in range(16)]
        return [
            1 + sum(a[i][k] * (8 * k + j) for k in range(16)) for i in range(16) for j in range(8)
        ]
    if name == "copies":  # the last copy brings 12 bytes, and a zero
        second = [64 + t for t in range(63)] + [0]
        return [float(t + 1000 * second[t]) for _ in blocks for t in reversed(threads)]
    if name == "flag_of_an_earlier_block":
        return [5.0] * 64 + [6.0] * 64
    if name == "flags_in_a_block":
        return [1.0] * 128
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
