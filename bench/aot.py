"""Compile every Triton configuration that the heuristics can choose, without a GPU, and judge it.

    python -m fusedpeft.bench.aot [--arch sm_90 ...] [--json FILE] [--check]

A row: kernel, arch, configuration, registers a thread, spills (stack bytes on NVIDIA, spilled
registers on AMD), shared memory against the chip's limit, blocks that fit on one SM or CU, and
whether the tensor cores of Hopper are used (`wgmma` in the PTX). --check exits with 1 on a spill,
on too much shared memory, or on a 16-bit GEMM of at least 64 rows without wgmma on sm_90. bf16,
bf16 with fp32 adapters, fp32; sizes divisible by 16 and unit inner strides, as models have.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedpeft.kernels import lora, lora_bwd, lora_gemm
from fusedpeft.kernels.lora_tables import ARCHS, lora_configs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}  # bytes a block
_SHARED_SM = {"sm_80": 167936, "sm_90": 233472, "gfx942": 65536}  # bytes an SM or CU

# kernel -> (function, the strides that are 1, pointers that are fp32 whatever the inputs); the
# pointers of _ADAPTER have the adapter's dtype, others the input's.
_ADAPTER = ("a_ptr", "b_ptr", "s_ptr")
_KERNELS = {
    "gemm": (lora_gemm._lora_gemm_kernel, "stride_xk stride_wk stride_ak stride_br", ""),
    "gemm_dx": (lora_gemm._lora_gemm_kernel, "stride_xk stride_wn stride_ar stride_bn", "s_ptr"),
    "shrink": (lora._lora_shrink_kernel, "stride_xk stride_ak", ""),
    "dsdb": (lora_bwd._lora_dsdb_kernel, "stride_dyn stride_br", "t_ptr db_ptr dbias_ptr"),
    "da": (lora_bwd._lora_da_kernel, "stride_xk", "t_ptr da_ptr"),
    "sum": (lora_bwd._sum_kernel, "", "part_ptr"),
}
_OPTIONS = ("num_warps", "num_stages")


def compile_row(row: dict, arch: str):
    """The compiled kernel of one row of `lora_configs`."""
    fn, unit_strides, fp32 = _KERNELS[row["kernel"]]
    dtypes = {2: "*bf16", 4: "*fp32"}
    constants = {k: v for k, v in row["config"].items() if k not in _OPTIONS} | row["flags"]
    constants |= dict.fromkeys(unit_strides.split(), 1)
    signature, attrs = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            size = row["adapter_bytes"] if name in _ADAPTER else row["elem_bytes"]
            size = 4 if name in fp32 else size
            signature[name] = "*i64" if name == "seed_ptr" else dtypes[size]
        else:
            signature[name] = "fp32" if name.endswith("scale") else "i32"
        if signature[name] != "fp32" and name not in ("threshold", "parts"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    options = {k: row["config"][k] for k in _OPTIONS}
    source = ASTSource(fn, signature, constants, attrs)
    return triton.compile(source, target=TARGETS[arch], options=options)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, stack and local bytes) from cuobjdump, which ships inside triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        cmd = [str(tool), "--dump-resource-usage", f.name]
        text = subprocess.run(cmd, check=True, capture_output=True, text=True).stdout
    use = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return use["REG"], use["STACK"] + use["LOCAL"]


def _amd_usage(text: str) -> tuple[int, int]:
    """(vector registers a lane, spilled registers) from the metadata of the assembly."""
    use = {k: int(v) for k, v in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    return use["vgpr_count"], use["vgpr_spill_count"] + use["sgpr_spill_count"]


def _blocks_per_sm(arch: str, registers: int, shared: int, warps: int) -> int:
    if arch == "gfx942":  # four SIMDs of 512 registers a lane, at most 8 waves each
        waves = min(8, 512 // (-(-max(registers, 1) // 8) * 8))
        by_registers = 4 * waves // warps
        return min(by_registers, _SHARED_SM[arch] // shared) if shared else by_registers
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, _SHARED_SM[arch] // (shared + 1024), 64 // warps, 32)


def measure(job: tuple[str, dict]) -> dict:
    """Compile one row and read its figures."""
    arch, row = job
    kernel = compile_row(row, arch)
    shared = kernel.metadata.shared
    if arch == "gfx942":
        registers, spills = _amd_usage(kernel.asm["amdgcn"])
    else:
        registers, spills = _nvidia_usage(kernel.asm["cubin"])
    return {
        "arch": arch,
        **row,
        **{"registers": registers, "spills": spills, "shared_bytes": shared},
        "blocks_per_sm": _blocks_per_sm(arch, registers, shared, row["config"]["num_warps"]),
        "wgmma": "wgmma.mma_async" in kernel.asm.get("ptx", ""),
    }


def problems(row: dict) -> list[str]:
    """What --check objects to."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spilled")
    if row["shared_bytes"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"{row['shared_bytes']} > {SHARED_LIMIT[row['arch']]} shared bytes")
    big_gemm = row["kernel"].startswith("gemm") and row["config"]["BLOCK_M"] >= 64
    if row["arch"] == "sm_90" and row["elem_bytes"] == 2 and big_gemm and not row["wgmma"]:
        found.append("no wgmma")
    if row["blocks_per_sm"] < 1:
        found.append("does not fit an SM")
    return found


def markdown(rows: list[dict]) -> str:
    """The table that people read."""
    head = "kernel | arch | dtype | flags | config | regs | spills | shared KiB | blocks/SM | wgmma"
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for r in rows:
        on = {**r["flags"], "hold": r["config"].get("HOLD", False)}
        flags = " ".join(k.lower() for k, v in on.items() if v) or "-"
        sizes = {k: v for k, v in r["config"].items() if k.startswith("BLOCK")}
        config = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in sizes.items())
        config += f" w{r['config']['num_warps']} s{r['config']['num_stages']}"
        dtype = "bf16" if r["elem_bytes"] == 2 else "fp32"
        dtype += "+fp32" if r["elem_bytes"] < r["adapter_bytes"] else ""
        cells = (
            *(r["kernel"], r["arch"], dtype, flags, config, r["registers"], r["spills"]),
            *(f"{r['shared_bytes'] / 1024:.1f}", r["blocks_per_sm"], "yes" if r["wgmma"] else "-"),
        )
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--check", action="store_true", help="exit with 1 on any problem")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter cannot compile; unset it")
    jobs = [(arch, row) for arch in args.arch or ARCHS for row in lora_configs(arch)]
    spawn = multiprocessing.get_context("spawn")  # LLVM's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        rows = list(pool.map(measure, jobs))
    print(markdown(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(r) for r in rows)  # a row a line: readable diffs
        version = json.dumps(triton.__version__)
        args.json.write_text(f'{{"triton": {version}, "rows": [\n{lines}\n]}}\n')
    bad = [(r, p) for r in rows if (p := problems(r))]
    for r, p in bad:
        print(f"{r['kernel']} {r['arch']} {r['flags']} {r['config']}: {', '.join(p)}")
    print(f"{len(rows)} configurations, {len(bad)} with problems", file=sys.stderr)
    return 1 if args.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
