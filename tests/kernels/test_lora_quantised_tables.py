"""The tiles over a quantised base, and its slabs: all listed. No triton needed."""

import random

import pytest

from fusedpeft.kernels.lora_quantised_tables import (
    ARCHS,
    DEQUANTISE_CONFIG,
    SLAB_BYTES,
    SLAB_TOKENS,
    lora_quantised_configs,
    quantised_config,
    slab,
)
from fusedpeft.kernels.lora_tables import gemm_config, lora_configs, tma_config


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_is_listed(arch):
    rows = lora_quantised_configs(arch)
    known = {}
    for row in rows:
        known.setdefault((row["kernel"], row["elem_bytes"]), []).append(row["config"])
    kinds, ways = ("nf4", "nf4_double", "fp8"), ("y", "dx", "slab", "slab_odd")
    assert {k for k, _ in known} == {f"{k}_{way}" for k in kinds for way in ways}
    slabs = [known.pop(key) for key in list(known) if "_slab" in key[0]]
    assert slabs == [[DEQUANTISE_CONFIG]] * 12
    rng = random.Random(0)
    for _ in range(500):
        m, n = (int(2 ** rng.uniform(0, 17)) for _ in range(2))
        for (kernel, size), configs in known.items():
            config = quantised_config(m, n, arch, size, dropout=kernel.endswith("_dx"))
            assert config in configs, (m, n, kernel)
            assert quantised_config(m, n, arch, size) in configs, (m, n, kernel)
    for row in rows:
        flags = row["flags"]
        if "_slab" in row["kernel"]:
            continue
        assert flags["FORWARD"] == row["kernel"].endswith("_y")
        assert row["config"]["BLOCK_M"] < 256 or not flags["DROPOUT"]
        assert not (flags["FP8"] and flags["DOUBLE"])
        assert not flags["DROPOUT"] if flags["FORWARD"] else not flags["HAS_BIAS"]


@pytest.mark.parametrize("arch", ARCHS)
def test_what_slabs_take_of_the_dense_base_is_listed_there(arch):
    """fp32 S: y beside fp32 adapters, dx beside any. No kernel is compiled for the first time on
    somebody's GPU only."""
    rng = random.Random(1)
    rows = [r for r in lora_configs(arch) if r["adapter_bytes"] == 4]
    for _ in range(300):
        m, n, k = (int(2 ** rng.uniform(8, 16)) for _ in range(3))
        r, size = rng.choice((3, 8, 16, 24, 64, 128)), rng.choice((2, 4))
        width = slab(m, n, k, size)
        for columns in {min(width, n), n % width or width}:
            wide = r % 16 == 0
            for kernel, p in (("gemm", False), ("gemm_dx", False), ("gemm_dx", True)):
                want = gemm_config(m, columns, r, arch, size, dropout=p)
                assert any(
                    (row["kernel"], row["elem_bytes"], row["wide_rank"]) == (kernel, size, wide)
                    and row["config"] == want
                    and row["flags"]["DROPOUT"] == p
                    and not row["flags"]["FUSE_S"]
                    for row in rows
                ), (kernel, m, columns, r)
            if tma := tma_config(m, columns, r, arch, size):
                for kernel in ("gemm_tma", "gemm_tma_dx"):
                    found = [x for x in rows if x["kernel"] == kernel and x["wide_rank"] == wide]
                    assert any(row["config"] == tma for row in found), (m, columns, r)


def test_slabs_hold_little_and_whole_tiles():
    assert slab(SLAB_TOKENS - 1, 4096, 4096, 2) == 0
    assert slab(1, 4096, 4096, 2, odd=True) == 2048  # of sizes that 16 does not divide no tiles
    assert slab(SLAB_TOKENS, 4096, 4096, 2) == 2048
    assert slab(8192, 4096, 14336, 2) == 512 and slab(8192, 14336, 4096, 2) == 2048
    assert slab(8192, 40, 72, 2) == 48  # all of a small W
    assert slab(8192, 70000, 1 << 20, 4) == 256  # at least a tile, whatever it takes
    for n, k, size in ((4096, 4096, 2), (14336, 4096, 4), (1000, 3000, 2)):
        assert slab(300, n, k, size) * k * size <= SLAB_BYTES


def test_an_unknown_arch():
    with pytest.raises(ValueError, match="expected one of .* got 'sm_61'"):
        lora_quantised_configs("sm_61")
