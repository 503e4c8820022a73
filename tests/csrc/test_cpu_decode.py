"""The CPU kernels: sanitizers and warnings, the instruction sets of this chip, threads, bits."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.dropout import dropout
from fusedpeft.ops.native import native

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fopenmp", f"-I{CSRC}"]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
DRIVERS = ("cpu_driver", "cpu_multi_lora", "cpu_prefix_train", "cpu_quantised")
LEVELS = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]
needs_native = pytest.mark.skipif(native is None, reason="the extension is not built")


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env={**os.environ, **env}
    )


def python(code: str, *args: str | Path, **env: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-c", code, *args, **env)


def levels_here() -> list[str]:
    done = python("from fusedpeft.ops.native import native; print(native.cpu_capability())")
    assert done.returncode == 0, done.stderr
    return LEVELS[LEVELS.index(done.stdout.strip()) :]


@pytest.fixture(scope="module")
def drivers(tmp_path_factory) -> dict[str, Path]:
    """cpu_driver.cpp with csrc/cpu, and again with cpu_wide.cpp in for AVX-512 and AMX.

    Those may not run here: they only have to compile.
    """
    folder, here = tmp_path_factory.mktemp("cpu"), Path(__file__).parent
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    built = run(CXX, *SANITIZE, probe, "-o", folder / "probe")
    if built.returncode or run(folder / "probe").returncode:
        pytest.skip(f"no address sanitizer here: {built.stderr[:200]}")

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        if source.stem.startswith(("amx", "avx512")):  # some warnings need -O1
            how = ["-O1"]
        elif source.stem in DRIVERS:  # whose sums in double take the time
            how = ["-O2", *SANITIZE]
        else:  # a third of -O1's time, and nothing is optimised away before it is checked; half as
            # much code as with each inlined function spelt out wherever it is called
            how = ["-O0", "-Dalways_inline=__unused__", *SANITIZE]
        done = run(CXX, *FLAGS, *how, "-c", source, "-o", made)
        assert done.returncode == 0, done.stderr[-4000:]
        return made

    own = (here / f"{name}.cpp" for name in ("cpu_wide", *DRIVERS))
    sources = [*own, *sorted((CSRC / "cpu").glob("*.cpp"))]  # what takes longest comes first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {made.stem: made for made in pool.map(compile_one, sources)}
    for name, left_out in (("driver", "cpu_wide"), ("wide", "portable")):
        parts = [made for stem, made in objects.items() if stem != left_out]
        done = run(CXX, *SANITIZE, "-fopenmp", *parts, "-o", folder / name)
        assert done.returncode == 0, done.stderr[-4000:]
    return {level: folder / "driver" for level in LEVELS} | {"wide": folder / "wide"}


@pytest.mark.parametrize(
    "level, threads", [("avx2", "3"), ("portable", "1"), ("wide", "1"), ("wide", "3")]
)
def test_ragged_shapes_under_sanitizers(drivers, level, threads):
    forced = "portable" if level == "wide" else level
    done = run(drivers[level], FUSEDPEFT_CPU=forced, OMP_NUM_THREADS=threads)
    if "expected one of" in done.stderr:
        pytest.skip(f"this chip has no {level}")
    assert done.returncode == 0 and done.stdout == f"{forced}: 0 failures\n", (
        done.stdout + done.stderr
    )


SAVE = """
import sys, torch
from fusedpeft import ops
from fusedpeft.ops.dropout import dropout
from fusedpeft.ops.native import native
g, out = torch.Generator().manual_seed(0), {"level": native.cpu_capability()}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for m in (1, 5, 16):
        sizes = ((m, 515), (77, 515), (12, 515), (77, 12))
        x, w, a, b = (torch.randn(*s, generator=g).to(dtype) for s in sizes)
        out[f"{dtype} {m}"] = ops.lora_linear(x, w, a, b, 0.1, impl="native")
        out[f"{dtype} {m} mask"] = dropout(x, 0.3, torch.tensor([5]))
        for q in (ops.NF4Weight.quantise(w[:, 1:], double=True), ops.FP8Weight.quantise(w[:, 1:])):
            kind = type(q).__name__
            y = ops.lora_linear(x[:, 1:], q, a[:, 1:], b, 0.1, impl="native")
            out[f"{dtype} {m} {kind}"] = y
            out[f"{dtype} {m} {kind} rows"] = q.dequantise(dtype)
torch.save(out, sys.argv[1])
"""


@needs_native
def test_instruction_sets_agree(tmp_path):
    """Those below the best one, forced: the same sums but for their order, the same masks."""
    found = {}
    for level in levels_here():
        done = python(SAVE, tmp_path / level, FUSEDPEFT_CPU=level)
        assert done.returncode == 0, done.stderr
        found[level] = torch.load(tmp_path / level)
        assert found[level].pop("level") == level
    best, *others = found.values()
    for other in others:
        for name, want in best.items():
            if name.endswith(("mask", "rows")):
                assert torch.equal(other[name], want), name
            else:  # sums of some 500 products of size 1, then one rounding
                step = torch.finfo(want.dtype).eps
                torch.testing.assert_close(other[name], want, atol=1e-4, rtol=2 * step)


@needs_native
def test_an_instruction_set_that_is_not_here_raises():
    code = "from fusedpeft.ops.native import native; native.cpu_capability()"
    done = python(code, FUSEDPEFT_CPU="mmx")
    assert "FUSEDPEFT_CPU: expected one of" in done.stderr and "got mmx" in done.stderr
    for level in set(LEVELS) - set(levels_here()):
        done = python(code, FUSEDPEFT_CPU=level)
        assert done.returncode == 1 and f"got {level}" in done.stderr


def make(m: int, k: int, n: int, r: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(m + k + n + r)
    sizes = ((m, k), (n, k), (r, k), (n, r))
    return tuple(torch.randn(*s, generator=g).to(dtype) for s in sizes)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_depend_on_neither_threads_nor_neighbours(dtype):
    x, w, a, b = make(16, 700, 501, 12, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([ops.lora_linear(row, w, a, b, 0.5, impl="native") for row in x.split(1)])
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for m in (3, 7, 16):
                got = ops.lora_linear(x[:m], w, a, b, 0.5, impl="native")
                assert torch.equal(got, alone[:m])
    finally:
        torch.set_num_threads(threads)


POOL = """
import os, sys, threading
import torch
from fusedpeft.ops.dropout import dropout
from fusedpeft import ops

def tasks():
    return len(os.listdir("/proc/self/task"))

sizes = ((4, 1024), (2048, 1024), (8, 1024), (2048, 8))
x, w, a, b = (torch.randn(*s) for s in sizes)
def decode():
    ops.lora_linear(x, w, a, b, 0.5, impl="native")
    dropout(w, 0.5, torch.tensor([1]))

torch.set_num_threads(1)
before = tasks()
decode()
counts = [tasks() - before]
thread = threading.Thread(target=lambda: (decode(), counts.append(tasks() - before)))
thread.start(); thread.join()
torch.set_num_threads(4)
decode()
counts.append(tasks() - before)
torch.randn(1 << 20).exp_()
counts.append(tasks() - before)
print(counts, len({l.split()[-1] for l in open("/proc/self/maps") if "gomp" in l}))
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_one_pool_of_threads_with_torch():
    """torch's count is obeyed, in another thread too (itself one), and torch then adds none."""
    done = python(POOL, OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "[0, 1, 3, 3] 1"


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_goes_in_and_out(dtype):
    """W holds all of them; times 1 they come back, and NaN stays NaN. A chip's unit for products of
    bf16 takes subnormals for 0."""
    w = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(1)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(65536, 1, dtype=dtype)
    got = ops.lora_linear(one, w, one, zero, 1.0, impl="native")[0]
    want = w[:, 0]
    if dtype == torch.bfloat16 and got[1] == 0:
        want = want.masked_fill(want.abs() < torch.finfo(dtype).tiny, 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_as_torch_rounds(dtype):
    """Ties, subnormals and overflow: one fp32 sum, rounded once to nearest, ties to even. Not the
    subnormals of bf16, which a chip's unit for them takes for 0."""
    g = torch.Generator().manual_seed(0)
    w = torch.randint(-(2**15), 2**15, (20000, 2), generator=g).to(torch.int16).view(dtype)
    w = torch.where(w.isfinite(), w, 1.0)
    if dtype == torch.bfloat16:
        w = torch.where(w.abs() < 2.0**-110, 1.0, w)
    x, a = torch.tensor([[1.0, 2.0**-8]], dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    got = ops.lora_linear(x, w, a, torch.zeros(20000, 1, dtype=dtype), 1.0, impl="native")[0]
    assert torch.equal(got, (w.float() @ x.float().t())[:, 0].to(dtype))


@needs_native
def test_offsets_past_2_31_elements():
    far = 2**31 + 5  # pages that nobody touches cost no memory
    x, w, a, b = make(2, 40, 2, 3, torch.bfloat16)
    wide = torch.empty(far + 40, dtype=torch.bfloat16).as_strided((2, 40), (far, 1))
    wide.copy_(w)
    want = ops.lora_linear(x, w, a, b, 0.5, impl="native")
    assert torch.equal(ops.lora_linear(x, wide, a, b, 0.5, impl="native"), want)
    wide.copy_(x)
    assert torch.equal(ops.lora_linear(wide, w, a, b, 0.5, impl="native"), want)
    torch.testing.assert_close(
        dropout(wide, 0.5, torch.tensor([2])), dropout(x, 0.5, torch.tensor([2])), rtol=0, atol=0
    )


@needs_native
def test_a_strided_bias_lives_until_the_call_is_over():
    x, w, a, b = make(1, 64, 4096, 4, torch.float32)
    bias = torch.randn(4096, 3)[:, 1]
    got = ops.lora_linear(x, w, a, b, 0.5, bias, impl="native")
    torch.testing.assert_close(
        got, ops.lora_linear_ref(x, w, a, b, 0.5, bias), rtol=1e-4, atol=1e-4
    )
