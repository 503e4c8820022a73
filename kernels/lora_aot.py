"""How each LoRA kernel is compiled ahead of time: see aot.py."""

from __future__ import annotations

from fusedpeft.kernels import lora, lora_bwd, lora_gemm, sums
from fusedpeft.kernels.aot import Spec

_A, _B, _S = ({f"{name}_ptr": "adapter"} for name in "abs")
_TILES = {"x_desc": "BLOCK_M BLOCK_K", "out_desc": "BLOCK_M BLOCK_OUT"}
_T, _SEED = {"t_ptr": "*fp32"}, {"seed_ptr": "*i64"}

SPECS = {
    "gemm": Spec(
        lora_gemm._lora_gemm_kernel,
        unit="stride_xk stride_wk stride_ak stride_br",
        types=_A | _B | _S | _SEED,
        ragged="threshold",
        rank="R stride_sm stride_bn",
        wgmma=True,
    ),
    "gemm_dx": Spec(
        lora_gemm._lora_gemm_kernel,
        unit="stride_xk stride_wn stride_ar stride_bn",
        types=_A | _B | _SEED | {"s_ptr": "*fp32"},
        ragged="threshold",
        rank="R stride_sm",
        wgmma=True,
    ),
    "gemm_tma": Spec(
        lora_gemm._lora_gemm_tma_kernel,
        unit="stride_br",
        types=_B | _S,
        tiles=_TILES | {"w_desc": "BLOCK_N BLOCK_K"},
        rank="R stride_sm stride_bn",
        wgmma=True,
    ),
    "gemm_tma_dx": Spec(
        lora_gemm._lora_gemm_tma_kernel,
        unit="stride_bn",
        types=_B | {"s_ptr": "*fp32"},
        tiles=_TILES | {"w_desc": "BLOCK_K BLOCK_N"},
        rank="R stride_sm",
        wgmma=True,
    ),
    "gemm_add": Spec(
        lora_gemm._lora_gemm_kernel,
        unit="stride_xk stride_wn stride_ar stride_bn",
        types=_SEED,
        ragged="threshold",
        wgmma=True,
    ),
    "shrink": Spec(
        lora._lora_shrink_kernel,
        unit="stride_xk stride_ak",
        types=_A | _S | _SEED,
        ragged="threshold",
        rank="R stride_sm",
    ),
    "dsdb": Spec(
        lora_bwd._lora_dsdb_kernel,
        unit="stride_dyn stride_br",
        types=_B | _S | _T | {"db_ptr": "*fp32", "dbias_ptr": "*fp32"},
        rank="R stride_bn stride_sm",
    ),
    "da": Spec(
        lora_bwd._lora_da_kernel,
        unit="stride_xk",
        types=_SEED | _T | {"da_ptr": "*fp32"},
        ragged="threshold M",
        rank="R",
    ),
    "sum": Spec(sums._sum_kernel, types={"part_ptr": "*fp32"}, ragged="parts"),
}
