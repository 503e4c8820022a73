"""How each kernel of the bottleneck adapter is compiled ahead of time: see aot.py."""

from __future__ import annotations

from fusedpeft.kernels import adapter_kernels as kernels
from fusedpeft.kernels import adapter_norm, sums
from fusedpeft.kernels.aot import Spec

_TYPES = {f"{name}_ptr": "*fp32" for name in "g stats dc means dd du de part fc".split()}
_TYPES |= {"seed_ptr": "*i64", "center": "fp32", "eps": "fp32"}
_TYPES |= {f"{name}_ptr": "adapter" for name in "p c e nw nb".split()}
_FLAGS = "threshold has_c has_e has_res has_nw has_nb add parts"
_FLAGS += " need_dp need_dc need_du need_de need_dw need_nw need_nb"


def _spec(fn, wgmma: bool = False) -> Spec:
    return Spec(fn, types=_TYPES, ragged=_FLAGS, wgmma=wgmma)


SPECS = {
    "fwd": _spec(kernels._adapter_fwd_kernel, wgmma=True),
    "up": _spec(kernels._adapter_up_kernel, wgmma=True),
    "bwd": _spec(kernels._adapter_bwd_kernel, wgmma=True),
    "dx": _spec(kernels._adapter_dx_kernel, wgmma=True),
    "dw": _spec(kernels._adapter_dw_kernel, wgmma=True),
    "fold": Spec(
        adapter_norm._adapter_fold_kernel, types=_TYPES | {"w_ptr": "adapter"}, ragged=_FLAGS
    ),
    "norm_grads": _spec(adapter_norm._adapter_norm_grads_kernel),
    "sum": Spec(sums._sum_kernel, types={"part_ptr": "*fp32"}, ragged="parts"),
}
