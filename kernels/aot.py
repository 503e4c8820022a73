"""Compile a configuration of any op without a GPU and read what the machine code needs.

Used by `python -m fusedpeft.bench.aot`. An op NAME brings two files: kernels/NAME_tables.py with
`NAME_configs(arch)`, the rows that its launchers can choose, and kernels/NAME_aot.py with `SPECS`,
how each of its kernels is compiled. Figures come from cuobjdump, which ships inside triton, and
from the metadata in AMD's assembly.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPS = (
    "adapter",
    "lora",
    "lora_quantised",
    "linear_logprob",
    "multi_lora",
    "prefix_attention",
    "soft_prompt",
)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes a block; of the smallest chips that take sm_80's tables (sm_86, sm_89, sm_120).
SHARED_LIMIT = {"sm_80": 101376, "sm_90": 232448, "gfx942": 65536}
_SHARED_SM = {"sm_80": 167936, "sm_90": 233472, "gfx942": 65536}  # bytes an SM or CU

_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Spec:
    """How one kernel is compiled. Names of arguments stand in one string, separated by spaces.

    unit: strides that are 1. types: argument -> Triton's type, or "adapter" for a pointer to
    elements of row["adapter_bytes"], or "halves" for an fp32 accumulator that 16-bit inputs keep as
    int16 halves of its bits; unless said, `*_ptr` points to the input's dtype
    (row["elem_bytes"]), `*scale` is fp32 and anything else an i32 divisible by 16. tiles: TMA
    descriptor -> the constants that are its block. ragged: integers that are not. rank: integers
    that are not where row["wide_rank"] is false. wgmma: a product that must use Hopper's tensor
    cores from 64 rows on.
    """

    fn: triton.JITFunction
    unit: str = ""
    types: Mapping[str, str] = field(default_factory=dict)
    tiles: Mapping[str, str] = field(default_factory=dict)
    ragged: str = ""
    rank: str = ""
    wgmma: bool = False

    def type_of(self, name: str, row: dict) -> str:
        pointers = {2: "*bf16", 4: "*fp32"}
        kind = self.types.get(name)
        if name in self.tiles:
            block = ",".join(str(row["config"][size]) for size in self.tiles[name].split())
            return f"tensordesc<{pointers[row['elem_bytes']][1:]}[{block}]>"
        if kind == "adapter":
            return pointers[row["adapter_bytes"]]
        if kind == "halves":
            return "*i16" if row["elem_bytes"] == 2 else "*fp32"
        if kind is not None:
            return kind
        if name.endswith("_ptr"):
            return pointers[row["elem_bytes"]]
        return "fp32" if name.endswith("scale") else "i32"


def configs(op: str, arch: str) -> list[dict]:
    """The rows of `op` on `arch`: {"kernel", "elem_bytes", "flags", "config", …}, each once."""
    tables = importlib.import_module(f"fusedpeft.kernels.{op}_tables")
    return getattr(tables, f"{op}_configs")(arch)


def specs(op: str) -> dict[str, Spec]:
    """kernel -> how it is compiled."""
    return importlib.import_module(f"fusedpeft.kernels.{op}_aot").SPECS


def compile_row(op: str, row: dict, arch: str):
    """The compiled kernel of one row of `configs(op, arch)`."""
    spec = specs(op)[row["kernel"]]
    constants = {k: v for k, v in row["config"].items() if k not in _OPTIONS} | row["flags"]
    constants |= dict.fromkeys(spec.unit.split(), 1)
    ragged = spec.ragged.split() + ([] if row.get("wide_rank", True) else spec.rank.split())
    signature, attrs = {}, {}
    for i, name in enumerate(spec.fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = spec.type_of(name, row)
        if signature[name] != "fp32" and name not in ragged and name not in spec.tiles:
            attrs[(i,)] = [["tt.divisibility", 16]]
    options = {k: row["config"][k] for k in _OPTIONS}
    source = ASTSource(spec.fn, signature, constants, attrs)
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


def measure(job: tuple[str, str, dict]) -> dict:
    """Compile one row (op, arch, row) and read its figures."""
    op, arch, row = job
    spec, kernel = specs(op)[row["kernel"]], compile_row(op, row, arch)
    shared = kernel.metadata.shared
    scalar = 0
    more = {"tma": "cp.async.bulk.tensor" in kernel.asm["ptx"]} if spec.tiles else {}
    if arch == "gfx942":
        registers, spills, scalar = _amd_usage(kernel.asm["amdgcn"])
    else:
        registers, spills = _nvidia_usage(kernel.asm["cubin"])
    return {
        "op": op,
        "arch": arch,
        **row,
        **{"registers": registers, "spills": spills, "scalar_spills": scalar},
        "shared_bytes": shared,
        "blocks_per_sm": _blocks_per_sm(arch, registers, shared, row["config"]["num_warps"]),
        "wgmma": "wgmma.mma_async" in kernel.asm.get("ptx", ""),
        **more,
    }
