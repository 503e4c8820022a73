"""How each kernel of linear log-prob is compiled ahead of time: see aot.py."""

from __future__ import annotations

from fusedpeft.kernels import linear_logprob_kernels as kernels
from fusedpeft.kernels import linear_logprob_tma as tma
from fusedpeft.kernels import sums
from fusedpeft.kernels.aot import Spec

_FP32 = "top total ref sum next_ref next_sum label_z lse dbias logp g"
_TYPES = {f"{name}_ptr": "*fp32" for name in _FP32.split()}
_TYPES |= {f"{name}_ptr": "*i64" for name in ("order", "count", "labels")}
_TYPES |= dict.fromkeys(("softcap", "inv_temperature", "jump"), "fp32")
_HALVES = {"hi_ptr": "halves", "lo_ptr": "halves"}

SPECS = {
    "logits": Spec(
        kernels._linear_logprob_logits_kernel,
        unit="stride_hk stride_wk",
        types=_TYPES,
        ragged="has_bias need_dbias",
        wgmma=True,
    ),
    "sum": Spec(
        kernels._linear_logprob_sum_kernel,
        unit="stride_wk",
        types=_TYPES | _HALVES,
        ragged="first tiles",
        wgmma=True,
    ),
    "logits_tma": Spec(
        tma._linear_logprob_logits_tma_kernel,
        types=_TYPES,
        tiles={"w_desc": "BLOCK_N BLOCK_K", "p_desc": "BLOCK_M HALF"},
        wgmma=True,
    ),
    "sum_tma": Spec(
        tma._linear_logprob_sum_tma_kernel,
        types=_TYPES | _HALVES,
        tiles={"p_desc": "BLOCK_M BLOCK_K", "w_desc": "BLOCK_K BLOCK_N"},
        ragged="first tiles",
        wgmma=True,
    ),
    "dw": Spec(kernels._linear_logprob_dw_kernel, unit="stride_hk", types=_TYPES, wgmma=True),
    "merge": Spec(kernels._linear_logprob_merge_kernel, types=_TYPES, ragged="tiles"),
    "finish": Spec(kernels._linear_logprob_finish_kernel, unit="stride_wk", types=_TYPES | _HALVES),
    "dbias_sum": Spec(sums._sum_kernel, types={"part_ptr": "*fp32"}, ragged="parts"),
}
