"""How each kernel of the LoRA GEMM of many adapters is compiled ahead of time: see aot.py."""

from __future__ import annotations

from fusedpeft.kernels import multi_lora
from fusedpeft.kernels.aot import Spec

_INTS = {f"{name}_ptr": "*i32" for name in ("slots", "order", "tiles", "rank")}
_COUNTS = "slots parts blocks_r part0 rank_steps"

SPECS = {
    "plan": Spec(multi_lora._multi_lora_plan_kernel, types=_INTS, ragged=_COUNTS),
    "shrink": Spec(
        multi_lora._multi_lora_shrink_kernel,
        unit="stride_xk",
        types=_INTS | {"a_ptr": "adapter", "scale_ptr": "*fp32"},
        ragged=_COUNTS,
    ),
    "gemm": Spec(
        multi_lora._multi_lora_gemm_kernel,
        unit="stride_xk stride_wk",
        types=_INTS | {"b_ptr": "adapter"},
        ragged=_COUNTS,
        wgmma=True,
    ),
}
