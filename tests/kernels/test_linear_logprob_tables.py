"""The tiles and chunks of linear log-prob: all listed, within their memory. No triton needed."""

import random

import pytest

from fusedpeft.kernels.device import ARCHS
from fusedpeft.kernels.linear_logprob_tables import (
    LAYOUTS,
    linear_logprob_bwd_config,
    linear_logprob_configs,
    linear_logprob_fwd_config,
)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_is_listed(arch):
    known = [(r["kernel"], r["elem_bytes"], r["config"]) for r in linear_logprob_configs(arch)]
    rng = random.Random(0)
    for _ in range(500):
        m, h, v = (int(2 ** rng.uniform(0, 17)) for _ in range(3))
        size, (layout, wide) = rng.choice((2, 4)), rng.choice(list(LAYOUTS.items()))
        f = linear_logprob_fwd_config(m, h, v, arch, elem_bytes=size, wide=wide)
        b = linear_logprob_bwd_config(m, h, v, arch, elem_bytes=size, wide=wide)
        for kernel, config in (
            (f"logits{layout}", f["logits"]), (f"sum{layout}", f["sum"]),
            (f"logits{layout}", b["logits"]), (f"sum{layout}", b["sum"]),
            ("dw" if wide else "dw_odd", b["dw"]),
        ):  # fmt: skip
            assert (kernel, size, config) in known
        assert wide or f["tma"] is None
        if tma := f["tma"]:
            assert ("logits_tma", size, tma["logits"]) in known
            assert ("sum_tma", size, tma["sum"]) in known
            assert tma["columns"] % tma["logits"]["BLOCK_N"] == 0
            assert tma["logits"]["HALF"] == tma["sum"]["TILE"] == tma["logits"]["BLOCK_N"] // 2
        assert f["columns"] % f["logits"]["BLOCK_N"] == 0 == f["rows"] % f["sum"]["BLOCK_M"]
        assert b["columns"] % b["logits"]["BLOCK_N"] == 0 and f["sum"]["TILE"] > 0


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
@pytest.mark.parametrize("m", (4096, 8192, 32768))
def test_extra_memory_is_a_twentieth_of_the_logits(m, arch):
    H, V = 4096, 128256
    usual = linear_logprob_fwd_config(m, H, V, arch)
    assert (usual["tma"] is not None) == (arch == "sm_90")
    for f in filter(None, (usual, usual["tma"])):
        stats = 2 * 4 * f["rows"] * f["columns"] // f["sum"]["TILE"] + 4 * m * 8
        extra = 2 * m * H + 2 * f["rows"] * (f["columns"] + H) + stats
        assert extra <= 0.05 * 2 * m * V
    b = linear_logprob_bwd_config(m, H, V, arch)
    assert 2 * m * (b["columns"] + H) <= 0.05 * 2 * m * V


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match="arch: expected one of"):
        linear_logprob_configs("sm_1")
