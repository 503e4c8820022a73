"""Compile a row of `lora_configs` without a GPU and read what the machine code needs.

Used by `python -m fusedpeft.bench.aot`. Figures come from cuobjdump, which ships inside triton, and
from the metadata in AMD's assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedpeft.kernels import lora, lora_bwd, lora_gemm

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
_UNALIGNED = ("threshold", "parts")
_RANK_SIZES = ("R", "stride_sm", "stride_bn")  # arguments that are the rank
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
        ragged = name in _UNALIGNED or (name in _RANK_SIZES and not row["wide_rank"])
        if signature[name] != "fp32" and not ragged:
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


def _amd_usage(text: str) -> tuple[int, int, int]:
    """(vector registers a lane, spills to memory, scalar spills) from the assembly's metadata.

    Scalar registers spill into lanes of a vector register; they reach memory only as scratch bytes
    (private_segment_fixed_size), which count as spills.
    """
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    use = {k: int(v) for k, v in re.findall(rf"\.({names}):\s+(\d+)", text)}
    memory = use["vgpr_spill_count"] + use["private_segment_fixed_size"]
    return use["vgpr_count"], memory, use["sgpr_spill_count"]


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
    scalar = 0
    if arch == "gfx942":
        registers, spills, scalar = _amd_usage(kernel.asm["amdgcn"])
    else:
        registers, spills = _nvidia_usage(kernel.asm["cubin"])
    return {
        "arch": arch,
        **row,
        **{"registers": registers, "spills": spills, "scalar_spills": scalar},
        "shared_bytes": shared,
        "blocks_per_sm": _blocks_per_sm(arch, registers, shared, row["config"]["num_warps"]),
        "wgmma": "wgmma.mma_async" in kernel.asm.get("ptx", ""),
    }
