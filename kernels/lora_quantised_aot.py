"""How the kernels over a quantised base are compiled ahead of time: see aot.py."""

from __future__ import annotations

from fusedpeft.kernels import lora_quantised
from fusedpeft.kernels.aot import Spec

_SCALES = ("absmax", "book", "absmax2", "offset", "code")
_TYPES = {f"{name}_ptr": "*fp32" for name in (*_SCALES, "s")} | {"w_ptr": "*u8", "seed_ptr": "*i64"}
_DOUBLE = _TYPES | {"absmax_ptr": "*u8"}


def _spec(types: dict[str, str], forward: bool) -> Spec:
    return Spec(
        lora_quantised._lora_quantised_kernel,
        unit="stride_xk " + ("stride_br" if forward else "stride_bn"),
        types=types,
        ragged="threshold step",
        rank="R stride_sm" + (" stride_bn" if forward else ""),
        wgmma=True,
    )


def _slab(types: dict[str, str], odd: bool) -> Spec:
    """odd: of a W whose sizes 16 does not divide; out's rows are aligned all the same."""
    ragged = "step rows cols width" if odd else "step"
    return Spec(lora_quantised._dequantise_kernel, types=types, ragged=ragged)


_KINDS = {"nf4": _TYPES, "nf4_double": _DOUBLE, "fp8": _TYPES}
SPECS = {
    f"{kind}_{'y' if forward else 'dx'}": _spec(types, forward)
    for kind, types in _KINDS.items()
    for forward in (True, False)
} | {
    f"{kind}_slab{'_odd' if odd else ''}": _slab(types, odd)
    for kind, types in _KINDS.items()
    for odd in (False, True)
}
