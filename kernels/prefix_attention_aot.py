"""How each kernel of prefix attention is compiled ahead of time: see aot.py."""

from __future__ import annotations

from fusedpeft.kernels import prefix_attention_bwd_kernels as backward
from fusedpeft.kernels import prefix_attention_kernels as forward
from fusedpeft.kernels import sums
from fusedpeft.kernels.aot import Spec

_TYPES = dict.fromkeys(("lse_ptr", "dlse_ptr", "delta_ptr"), "*fp32")
_TYPES |= dict.fromkeys(("cu_ptr", "ids_ptr"), "*i64")
_RAGGED = " ".join(forward._SIZES)
_PARTS = {"dpk_ptr": "*fp32", "dpv_ptr": "*fp32"}
_OF_PREFIX = f"{_RAGGED} batch prefixes own parts"

SPECS = {
    "fwd": Spec(
        forward._prefix_attention_fwd_kernel,
        unit="stride_ms",
        types=_TYPES,
        ragged=_RAGGED,
        wgmma=True,
    ),
    "dq": Spec(
        backward._prefix_attention_dq_kernel,
        unit="stride_ms",
        types=_TYPES,
        ragged=f"{_RAGGED} has_dlse need_dq",
        wgmma=True,
    ),
    "dkv": Spec(
        backward._prefix_attention_dkv_kernel,
        unit="stride_ms",
        types=_TYPES,
        ragged=_RAGGED,
        wgmma=True,
    ),
    "dprefix": Spec(
        backward._prefix_attention_dprefix_kernel, types=_TYPES, ragged=_OF_PREFIX, wgmma=True
    ),
    "dprefix_parts": Spec(
        backward._prefix_attention_dprefix_kernel,
        types=_TYPES | _PARTS,
        ragged=_OF_PREFIX,
        wgmma=True,
    ),
    "parts_sum": Spec(sums._sum_kernel, types={"part_ptr": "*fp32"}, ragged="parts"),
}
