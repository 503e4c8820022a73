"""The tiles over a quantised base: all listed. No triton needed."""

import random

import pytest

from fusedpeft.kernels.lora_quantised_tables import (
    ARCHS,
    lora_quantised_configs,
    quantised_config,
)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_is_listed(arch):
    rows = lora_quantised_configs(arch)
    known = {}
    for row in rows:
        known.setdefault((row["kernel"], row["elem_bytes"]), []).append(row["config"])
    kinds = ("nf4", "nf4_double", "fp8")
    assert {k for k, _ in known} == {f"{k}_{way}" for k in kinds for way in ("y", "dx")}
    rng = random.Random(0)
    for _ in range(500):
        m, n = (int(2 ** rng.uniform(0, 17)) for _ in range(2))
        for (kernel, size), configs in known.items():
            config = quantised_config(m, n, arch, size, dropout=kernel.endswith("_dx"))
            assert config in configs, (m, n, kernel)
            assert quantised_config(m, n, arch, size) in configs, (m, n, kernel)
    for row in rows:
        flags = row["flags"]
        assert flags["FORWARD"] == row["kernel"].endswith("_y")
        assert row["config"]["BLOCK_M"] < 256 or not flags["DROPOUT"]
        assert not (flags["FP8"] and flags["DOUBLE"])
        assert not flags["DROPOUT"] if flags["FORWARD"] else not flags["HAS_BIAS"]


def test_an_unknown_arch():
    with pytest.raises(ValueError, match="expected one of .* got 'sm_61'"):
        lora_quantised_configs("sm_61")
