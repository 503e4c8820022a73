"""The tiles of prefix attention: all listed, within their memory. No triton needed."""

import pytest

from fusedpeft.kernels.device import ARCHS, SMS
from fusedpeft.kernels.prefix_attention_tables import (
    HEAD_TILES,
    KERNELS,
    head_tile,
    prefix_attention_config,
    prefix_attention_configs,
    prefix_parts,
)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_is_listed(arch):
    rows = prefix_attention_configs(arch)
    known = [(r["kernel"], r["elem_bytes"], r["flags"].get("MASK"), r["config"]) for r in rows]
    for d in range(1, 257):
        for size in (2, 4):
            for kernel in KERNELS:
                for mask in (False, True):
                    config = prefix_attention_config(kernel, d, arch, elem_bytes=size, mask=mask)
                    flag = None if kernel == "dprefix" else mask
                    assert (kernel, size, flag, config) in known
                    assert config["BLOCK_D"] >= d and config["BLOCK_D"] < max(65, 2 * d)
    assert len({str(r) for r in rows}) == len(rows)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_mask_does_not_change_the_prefix_kernel(arch):
    for d in HEAD_TILES:
        a, b = (prefix_attention_config("dprefix", d, arch, mask=m) for m in (False, True))
        assert a == b


def test_head_tiles():
    assert [head_tile(d) for d in (1, 64, 65, 128, 129, 256)] == [64, 64, 128, 128, 256, 256]


def test_parts_fill_the_sms_and_are_bounded_by_them():
    assert prefix_parts(128, 8, 1, 256, "sm_90", block_n=64) == 8  # 2 × 8 × 8 on 132 SMs
    assert prefix_parts(128, 8, 1, 3, "sm_90", block_n=64) == 3
    assert prefix_parts(0, 8, 1, 0, "sm_90", block_n=64) == 1
    assert prefix_parts(16, 8, 1000, 256, "sm_90", block_n=64) == 1
    for arch in ARCHS:
        for p, heads in ((1, 1), (100, 8), (1024, 32)):
            parts = prefix_parts(p, heads, 1, 512, arch, block_n=64)
            assert parts == 1 or parts * -(-p // 64) * heads <= SMS[arch]


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match="arch: expected one of"):
        prefix_attention_configs("sm_1")
