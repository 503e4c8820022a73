"""The tile heuristics: finite, listed in full, monotonous where it matters. No triton needed."""

import random

import pytest

from fusedpeft.kernels.lora_tables import (
    ARCHS,
    add_config,
    block_r,
    gemm_config,
    lora_bwd_config,
    lora_configs,
    lora_fwd_config,
    shrink_config,
    strided_rank,
    tma_config,
)


def listed(arch):
    keys = set()
    for row in lora_configs(arch):
        flags = tuple(sorted(k for k, v in row["flags"].items() if v))
        config = tuple(sorted(row["config"].items()))
        keys.add((row["kernel"], row["elem_bytes"], flags, config))
    return keys


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_is_listed(arch):
    rng = random.Random(0)
    known = listed(arch)
    for _ in range(3000):
        m, n, k = (int(2 ** rng.uniform(0, 17)) for _ in range(3))
        r, p, size = rng.randint(1, 200), rng.random() < 0.5, rng.choice((2, 4))
        f = lora_fwd_config(m, n, k, r, arch, dropout=p, elem_bytes=size)
        g = lora_bwd_config(m, n, k, r, arch, dropout=p, elem_bytes=size)
        drop = ("DROPOUT",) if p else ()
        fuse = ("FUSE_S", "HAS_BIAS") if f["fuse_shrink"] else ("HAS_BIAS",)
        chosen = [("gemm", fuse, f["gemm"]), ("gemm_dx", drop, g["gemm"]), ("da", drop, g["da"])]
        chosen.append(("dsdb", ("NEED_DB", "NEED_DS"), g["dsdb"]))
        if f["tma"]:
            chosen.append(("gemm_tma", ("HAS_BIAS", "W_IS_NK"), f["tma"]))
        if g["tma"]:
            chosen.append(("gemm_tma_dx", (), g["tma"]))
        if f["shrink"]:
            chosen.append(("shrink", drop, f["shrink"]))
        for kernel, flags, config in chosen:
            key = (kernel, size, flags, tuple(sorted(config.items())))
            assert key in known, (m, n, k, r, p, key)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("r", [1, 15, 16, 17, 64, 65, 200])
def test_a_fused_shrink_holds_the_whole_rank(arch, r):
    for m in (1, 16, 17, 64, 65, 8192):
        for n in (16, 1024, 1025, 8192):
            f = lora_fwd_config(m, n, 4096, r, arch)
            assert f["fuse_shrink"] == (f["shrink"] is None)
            assert not f["fuse_shrink"] or r <= f["gemm"]["BLOCK_R"]
            assert not lora_fwd_config(m, n, 4096, r, arch, dropout=True)["fuse_shrink"]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_for_several_projections_is_listed(arch):
    rng = random.Random(1)
    known = listed(arch)
    for _ in range(1000):
        m, n, k = (int(2 ** rng.uniform(0, 17)) for _ in range(3))
        ranks = [rng.choice((0, 1, 8, 16, 24, 64, 100)) for _ in range(3)]
        total, size = sum(ranks), rng.choice((2, 4))
        by = strided_rank(ranks[1], ranks[0], total)
        chosen = [("gemm", ("HAS_BIAS",), gemm_config(m, n, by, arch, size))]
        if tma := tma_config(m, n, by, arch, size):
            chosen.append(("gemm_tma", ("HAS_BIAS", "W_IS_NK"), tma))
        chosen.append(("gemm_add", ("ACCUMULATE",), add_config(m, k, arch, size)))
        alone = lora_fwd_config(m, n, k, by, arch, elem_bytes=size)
        if m <= 64 and ranks[1] > 0 and alone["fuse_shrink"]:
            fused = gemm_config(m, n, by, arch, size, fuse=True)
            chosen.append(("gemm", ("FUSE_S", "HAS_BIAS"), fused))
        if total > 0:
            chosen.append(("shrink", (), shrink_config(m, total, arch, size)))
        if ranks[1] > 0:
            dsdb = lora_bwd_config(m, n, k, by, arch, elem_bytes=size)["dsdb"]
            chosen.append(("dsdb", ("NEED_DB", "NEED_DS"), dsdb))
        for kernel, flags, config in chosen:
            key = (kernel, size, flags, tuple(sorted(config.items())))
            assert key in known, (m, n, k, ranks, key)


def test_tma_is_for_large_16_bit_products_of_hopper_without_a_mask():
    shape = (8192, 4096, 4096, 16)
    f, g = lora_fwd_config(*shape, "sm_90"), lora_bwd_config(*shape, "sm_90")
    assert f["tma"] == g["tma"] and f["tma"]["BLOCK_OUT"] * 2 == f["tma"]["BLOCK_N"]
    assert lora_fwd_config(*shape, "sm_90", dropout=True)["tma"]  # S has the mask, y needs none
    assert not lora_bwd_config(*shape, "sm_90", dropout=True)["tma"]
    assert not lora_fwd_config(*shape, "sm_90", elem_bytes=4)["tma"]
    assert not lora_fwd_config(8192, 1024, 4096, 16, "sm_90")["tma"]  # S is made in the K loop
    assert not lora_fwd_config(1024, 4096, 4096, 16, "sm_90")["tma"]  # 128 tiles, 132 SMs
    assert not any(lora_fwd_config(*shape, arch)["tma"] for arch in ARCHS if arch != "sm_90")


def test_a_neighbours_rank_spoils_the_wide_loads_of_a_multiple_of_16():
    assert strided_rank(16, 16, 48) == 16 and strided_rank(64, 0, 64) == 64
    assert strided_rank(16, 8, 32) == 15  # starts between two lines
    assert strided_rank(16, 0, 24) == 15  # rows of S do
    assert strided_rank(12, 8, 20) == 12 and strided_rank(0, 8, 24) == 0
    assert all(block_r(r - 1, 2) == block_r(r, 2) for r in (16, 32, 64, 128))


def test_splits_never_exceed_the_work():
    for arch in ARCHS:
        for m, n, k in ((1, 1, 1), (8192, 4096, 4096), (17, 100_000, 3), (100_000, 3, 17)):
            g = lora_bwd_config(m, n, k, 16, arch)
            assert 1 <= g["dsdb_splits"] <= -(-n // g["dsdb"]["BLOCK_N"])
            assert 1 <= g["da_splits"] <= -(-m // g["da"]["BLOCK_M"])


def test_rank_tiles_and_unknown_arch():
    assert [block_r(r, 2) for r in (1, 16, 17, 500)] == [16, 16, 64, 64]
    assert block_r(500, 4) == 16
    with pytest.raises(ValueError, match="expected one of .* got 'sm_61'"):
        lora_configs("sm_61")
