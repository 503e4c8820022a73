"""How each soft-prompt kernel is compiled ahead of time: see aot.py."""

from __future__ import annotations

from fusedpeft.kernels import soft_prompt
from fusedpeft.kernels.aot import Spec

_IDS = {"ids_ptr": "*i64", "prompt_ids_ptr": "*i64"}

SPECS = {
    "fwd": Spec(
        soft_prompt._soft_prompt_fwd_kernel,
        unit="stride_it stride_td stride_pd",
        types=_IDS | {"prompt_ptr": "adapter"},
        ragged="T P vocab prompts stride_ib",
    ),
    "bwd": Spec(
        soft_prompt._soft_prompt_bwd_kernel,
        unit="stride_dd",
        types=_IDS | {"out_ptr": "adapter"},
        ragged="B P",
    ),
}
