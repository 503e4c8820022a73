"""The tiles of the bottleneck adapter: all listed, within their memory. No triton needed."""

import json
import random
from pathlib import Path

import pytest

from fusedpeft.kernels.adapter_tables import (
    ACTIVATIONS,
    MAX_BWD_E,
    MAX_FWD_E,
    adapter_bwd_config,
    adapter_configs,
    adapter_fwd_config,
)
from fusedpeft.kernels.device import ARCHS

TABLE = Path(__file__).parents[2] / "bench/results/aot/adapter.json"


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_is_listed(arch):
    known = {(r["kernel"], r["elem_bytes"], r["flags"].get("WHOLE"), str(r["config"]))
             for r in adapter_configs(arch)}  # fmt: skip
    rng = random.Random(0)
    for _ in range(2000):
        m, d, e = (int(2 ** rng.uniform(0, top)) for top in (20, 15, 12))
        size = rng.choice((2, 4))
        f = adapter_fwd_config(m, d, e, arch, elem_bytes=size)
        b = adapter_bwd_config(m, d, e, arch, elem_bytes=size)
        assert f["whole"] == (e <= MAX_FWD_E[size]) and b["whole"] == (e <= MAX_BWD_E[size])
        chosen = [("fwd", f["whole"], f["down"]), ("dw", None, b["dw"])]
        chosen += [("bwd", False, b["down"])] + [("bwd", True, b["down"])] * b["whole"]
        chosen += [] if f["whole"] else [("up", None, f["up"])]
        chosen += [] if b["whole"] else [("dx", None, b["dx"])]
        for kernel, whole, config in chosen:
            assert (kernel, size, whole, str(config)) in known, (kernel, m, d, e, size)
        assert not f["whole"] or e <= f["down"]["BLOCK_E"] < 2 * max(e, 32)
        assert 1 <= b["dw_splits"] <= -(-m // b["dw"]["BLOCK_M"])


@pytest.mark.parametrize("arch", ARCHS)
def test_every_activation_and_flag_is_listed(arch):
    rows = adapter_configs(arch)
    for kernel in ("fwd", "bwd", "dw"):
        mine = [r for r in rows if r["kernel"] == kernel]
        for config in {str(r["config"]) for r in mine}:
            here = [r["flags"] for r in mine if str(r["config"]) == config]
            every = kernel == "dw" or "'BLOCK_M': 16" not in config
            assert {f["ACT"] for f in here} == set(ACTIVATIONS if every else ["gelu"])
            assert {f["NORM"] for f in here} == {False, True}


def test_the_bar_of_one_wave():
    """M 8192 on an H200: a block of 64 rows for nearly every SM, one kernel a direction."""
    f = adapter_fwd_config(8192, 4096, 64, "sm_90")
    assert f["whole"] and f["down"]["BLOCK_M"] == 64 and f["down"]["BLOCK_E"] == 64
    b = adapter_bwd_config(8192, 4096, 64, "sm_90")
    assert b["dw_splits"] * 4096 // b["dw"]["BLOCK_N"] >= 132


def test_few_rows_take_small_blocks():
    assert adapter_fwd_config(512, 4096, 64, "sm_90")["down"]["BLOCK_M"] == 16


def test_sm_80_fits_chips_of_99_kib():
    rows = [r for r in json.loads(TABLE.read_text())["rows"] if r["arch"] == "sm_80"]
    assert rows and max(r["shared_bytes"] for r in rows) <= 99 * 1024


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match="arch: expected one of"):
        adapter_configs("sm_1")
