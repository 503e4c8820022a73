"""How each kernel of linear log-prob is compiled ahead of time: see aot.py."""

from __future__ import annotations

from fusedpeft.kernels import linear_logprob_kernels as kernels
from fusedpeft.kernels import linear_logprob_tma as tma
from fusedpeft.kernels import sums
from fusedpeft.kernels.aot import Spec
from fusedpeft.kernels.linear_logprob_tables import LAYOUTS

_FP32 = "top total ref sum next_ref next_sum label_z lse dbias logp g"
_TYPES = {f"{name}_ptr": "*fp32" for name in _FP32.split()}
_TYPES |= {f"{name}_ptr": "*i64" for name in ("order", "count", "labels")}
_TYPES |= dict.fromkeys(("softcap", "inv_temperature", "jump"), "fp32")
_TYPES |= {"hi_ptr": "halves", "lo_ptr": "halves"}

_RAGGED = " ".join((*kernels._SIZES, *kernels._GATHERED)) + " first has_bias need_dbias"
_ODD = "H h_ptr w_ptr bias_ptr stride_hm stride_wv stride_wk stride_om stride_dv"


def _spec(fn, layout: str, wgmma: bool = False) -> Spec:
    unit = ("stride_hk", "stride_wv" if layout == "_column" else "stride_wk")
    return Spec(
        fn,
        unit=" ".join(name for name in unit if name in fn.arg_names),
        types=_TYPES,
        ragged=_RAGGED if LAYOUTS[layout] else f"{_RAGGED} {_ODD}",
        wgmma=wgmma,
    )


SPECS = {}
for _layout in LAYOUTS:
    SPECS |= {
        f"logits{_layout}": _spec(kernels._linear_logprob_logits_kernel, _layout, wgmma=True),
        f"sum{_layout}": _spec(kernels._linear_logprob_sum_kernel, _layout, wgmma=True),
        f"finish{_layout}": _spec(kernels._linear_logprob_finish_kernel, _layout),
    }
    if _layout != "_column":
        SPECS[f"dw{_layout}"] = _spec(kernels._linear_logprob_dw_kernel, _layout, wgmma=True)

SPECS |= {
    "logits_tma": Spec(
        tma._linear_logprob_logits_tma_kernel,
        types=_TYPES,
        tiles={"w_desc": "BLOCK_N BLOCK_K", "p_desc": "BLOCK_M HALF"},
        ragged=_RAGGED,
        wgmma=True,
    ),
    "sum_tma": Spec(
        tma._linear_logprob_sum_tma_kernel,
        types=_TYPES,
        tiles={"p_desc": "BLOCK_M BLOCK_K", "w_desc": "BLOCK_K BLOCK_N"},
        ragged=_RAGGED,
        wgmma=True,
    ),
    "merge": Spec(kernels._linear_logprob_merge_kernel, types=_TYPES, ragged=_RAGGED),
    "dbias_sum": Spec(sums._sum_kernel, types={"part_ptr": "*fp32"}, ragged="parts"),
    "dbias_sum_odd": Spec(sums._sum_kernel, types={"part_ptr": "*fp32"}, ragged="parts numel"),
}
