"""How each kernel of the LoRA GEMM of many adapters is compiled ahead of time: see aot.py."""

from __future__ import annotations

from fusedpeft.kernels import multi_lora
from fusedpeft.kernels.aot import Spec

_INTS = {f"{name}_ptr": "*i32" for name in ("slots", "order", "tiles", "rank")}
_COUNTS = "M slots parts blocks_r part0 rank_steps"
_ODD = (
    "K n0 n1 n2 n3 start0 stride_xm stride_wn stride_as stride_ar stride_bs stride_om a_ptr b_ptr"
)


def _shrink(odd: str) -> Spec:
    types = _INTS | {"a_ptr": "adapter", "scale_ptr": "*fp32"}
    fn, ragged = multi_lora._multi_lora_shrink_kernel, f"{_COUNTS} {odd}"
    return Spec(fn, unit="stride_xk", types=types, ragged=ragged)


def _gemm(odd: str) -> Spec:
    fn, ragged = multi_lora._multi_lora_gemm_kernel, f"{_COUNTS} {odd}"
    types = _INTS | {"b_ptr": "adapter"}
    return Spec(fn, unit="stride_xk stride_wk", types=types, ragged=ragged, wgmma=True)


SPECS = {
    "plan": Spec(multi_lora._multi_lora_plan_kernel, types=_INTS, ragged=_COUNTS),
    "shrink": _shrink(""),
    "shrink_odd": _shrink(_ODD),
    "gemm": _gemm(""),
    "gemm_odd": _gemm(_ODD),
}
