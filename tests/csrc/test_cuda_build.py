"""The CUDA half as nvcc made it: every architecture, no spills, errors with the kernel's name. And
what FUSEDPEFT_CUDA and FUSEDPEFT_CUDA_ARCHS refuse."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedpeft.ops.native import native

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {  # name: instances
    "adapter_decode_kernel": 10,
    "multi_lora_fma_kernel": 3,
    "multi_lora_mma_kernel": 8,
    "prefix_decode_fma_kernel": 3,
    "prefix_decode_merge_kernel": 3,
    "prefix_decode_mma_kernel": 6,
}
MOST_REGISTERS = {
    "prefix_decode_mma_kernel": 255,  # shared memory bounds its blocks an SM
    "multi_lora": 168,  # two blocks of six warps an SM
}
INFO = native.build_info() if native is not None else {"cuda": False}
needs_cuda_half = pytest.mark.skipif(
    not INFO["cuda"], reason="fusedpeft._C was built without its CUDA half: no nvcc, or 0 asked for"
)


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """From the CUDA toolkit or from triton; skips where neither brings it."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None:
        tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(tool) if tool.is_file() else None
    return found or pytest.skip("no cuobjdump in PATH or in triton")


def dump(tool: str, *options: str) -> str:
    command = [tool, *options, native.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_cuda_half
def test_every_architecture_is_there_and_nothing_spills(cuobjdump):
    archs, ptx = INFO["cuda_archs"].split("+")
    assert ptx == "PTX"
    seen: dict[str, dict[str, int]] = {}
    arch = ""
    usage = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    name = ""
    for line in dump(cuobjdump, "--dump-resource-usage").splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := usage.search(line):
            registers, stack, shared, local = map(int, found.groups())
            assert (stack, local) == (0, 0), f"{name} spills on sm_{arch}: {line}"
            most = next((r for k, r in MOST_REGISTERS.items() if k in name), 128)
            assert registers <= most and shared <= 48 << 10, f"{name} on sm_{arch}: {line}"
            (kernel,) = (k for k in KERNELS if k in name)
            counts = seen.setdefault(arch, dict.fromkeys(KERNELS, 0))
            counts[kernel] += 1
    assert seen == dict.fromkeys(archs.split(";"), KERNELS)
    last = archs.split(";")[-1].rstrip("af")
    assert re.search(rf"\.sm_{last}\.ptx", dump(cuobjdump, "--list-ptx"))


@needs_cuda_half
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the launch would succeed")
def test_a_failed_launch_names_its_kernel():
    calls = dict(q=16, k=16, v=16, pk=0, pv=0, slots=8, prefix_length=0, lengths=0, table=0)
    calls |= dict(out=16, lse=8, b=1, h=2, hkv=1, t=1, s=8, d=64, slot_count=0, max_prefix=0)
    calls |= dict(sk=(512, 512, 64), sv=(512, 512, 64), spk=(0, 0, 0), spv=(0, 0, 0))
    calls |= dict(table_stride=0, block=0, block_count=0, scale=1.0, window=0, dtype=1, work=8)
    with pytest.raises(RuntimeError, match="^prefix_decode_mma_kernel: "):
        native.prefix_decode_cuda(*calls.values(), 1, 1, 0)


MULTI_LORA = dict(
    x=8, w=8, bias=0, y=8, slots=8, a=8, b=8, rank=8, scale=8, s=8, sums=0, sizes=(24, 8),
    count=3, max_rank=8, m=4, k=64, n=32, sx=64, sw=64, a_slot=1024, a_row=64, b_slot=256,
    processors=132, splits=1, dtype=1, adapter_dtype=1, one_scale=1.0, stream=0,
)  # fmt: skip


@needs_cuda_half
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"w": 0}, r"^w: expected an address, got null for \[32, 64\]$"),
        ({"m": -1}, r"^x: expected sizes >= 0, got \[-1, 64\]$"),
        ({"sw": -64}, "^w: expected a row stride >= 0, got -64$"),
        ({"dtype": 3}, "^dtype: expected a code 0..2, got 3$"),
        ({"slots": 0}, r"^slots: expected an address, got null for \[4, 1\]$"),
        ({"count": 1, "rank": 0}, r"^rank: expected an address, got null for \[1, 2\]$"),
        (  # one adapter for all has no slots, ranks and scales, and is one
            {"slots": 0, "rank": 0, "scale": 0},
            r"^slots: expected an address, got null for \[4, 1\]$",
        ),
        ({"s": 0}, "^s, sums: expected addresses, got null$"),
        ({"splits": 2}, "^s, sums: expected addresses, got null$"),
        ({"splits": 0, "sums": 8}, "^splits: expected 1 <= splits <= 16, got 0$"),
        ({"m": 65}, "^m: expected at most 64, got 65$"),
        ({"k": 2**31}, r"^k, count, max_rank: expected <= 2\^30, got 2147483648, 3, 8$"),
        ({"sizes": (24,)}, "^sizes: expected a sum of n = 32, got 24$"),
        ({"sizes": (2,) * 17}, "^sizes: expected at most 16 parts, got 17$"),
        ({"sizes": ()}, "^parts: expected 1 <= parts <= 16, got 0$"),
        ({"processors": 0}, "^processors: expected >= 1, got 0$"),
        ({"adapter_dtype": 2}, r"^adapter_dtype: expected x's or fp32 \(0\), got 2 beside 1$"),
    ],
)
def test_multi_lora_refuses_bad_input_before_the_launch(changed, message):
    with pytest.raises(ValueError, match=message):
        native.multi_lora_cuda(*(MULTI_LORA | changed).values())


@needs_cuda_half
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the launch would be made")
@pytest.mark.parametrize("kernel", ["multi_lora", "adapter_decode"])
def test_what_fails_before_the_launch_is_named(kernel):
    call = MULTI_LORA if kernel == "multi_lora" else ADAPTER
    with pytest.raises(RuntimeError, match="^workspace: "):
        getattr(native, f"{kernel}_cuda")(*call.values())


ADAPTER = dict(
    x=16, residual=0, y=16, slots=8, size=8, scale=8, down=16, down_bias=16, up=16, up_bias=16,
    norm_weight=0, norm_bias=0, count=3, m=4, d=64, sx=64, sr=0, down_slot=512, down_bias_slot=8,
    up_slot=512, up_bias_slot=64, norm_weight_slot=0, norm_bias_slot=0, eps=1e-5, norm=0,
    activation=0, dtype=1, adapter_dtype=1, max_size=8, processors=132, stream=0,
)  # fmt: skip


@needs_cuda_half
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"y": 0}, r"^y: expected an address, got null for \[4, 64\]$"),
        ({"size": 0}, "^pool: expected addresses, got null$"),
        ({"m": 257}, "^m: expected 0 <= m <= 256, got 257$"),
        ({"max_size": 12}, "^max_size: expected a multiple of 8 up to 2048, got 12$"),
        ({"max_size": 2056}, "^max_size: expected a multiple of 8 up to 2048, got 2056$"),
        ({"activation": 6}, "^activation: expected a code 0..5, got 6$"),
        ({"norm": 3}, "^norm: expected a code 0..2, got 3$"),
        ({"adapter_dtype": 2}, r"^adapter_dtype: expected x's or fp32 \(0\), got 2 beside 1$"),
        ({"processors": 0}, "^processors: expected >= 1, got 0$"),
    ],
)
def test_adapter_decode_refuses_bad_input_before_the_launch(changed, message):
    with pytest.raises(ValueError, match=message):
        native.adapter_decode_cuda(*(ADAPTER | changed).values())


@needs_cuda_half
def test_nothing_to_do_launches_nothing():
    native.adapter_decode_cuda(*(ADAPTER | {"m": 0}).values())
    native.multi_lora_cuda(*(MULTI_LORA | {"m": 0}).values())


def test_links_no_runtime_that_must_match_torchs():
    if native is None or shutil.which("readelf") is None:
        pytest.skip("needs a built extension and readelf")
    done = subprocess.run(["readelf", "-d", native.__file__], capture_output=True, text=True)
    needed = set(re.findall(r"NEEDED.*\[(\S+?)\.so", done.stdout))
    assert needed and not {n for n in needed if re.match("libgomp|libcuda|libtorch|libc10", n)}


@pytest.mark.parametrize(
    "env, message",
    [
        ({"FUSEDPEFT_CUDA": "1", "NVCC": "no-such-nvcc"}, "FUSEDPEFT_CUDA=1: found no nvcc; put"),
        ({"FUSEDPEFT_CUDA": "yes"}, "FUSEDPEFT_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"CXX": "no-such-compiler"}, "expected a C++ compiler, found no 'no-such-compiler'"),
        (
            {"FUSEDPEFT_CUDA_ARCHS": "80;sm_90"},
            "FUSEDPEFT_CUDA_ARCHS: expected a list as 80;86;89;90a, got 'sm_90'",
        ),
    ],
)
def test_the_build_stops_with_one_line(tmp_path, env, message):
    if "FUSEDPEFT_CUDA_ARCHS" in env and shutil.which("nvcc") is None:
        pytest.skip("needs nvcc: without it no architecture is read")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("pyext", "kernels", "bench"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=tmp_path,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"fusedpeft: {message}")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("build/**/*.o"))
