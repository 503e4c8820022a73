"""The tiles of the LoRA GEMM of many adapters: finite and listed in full. No triton needed."""

import random

import pytest

from fusedpeft.kernels.device import ARCHS
from fusedpeft.kernels.multi_lora_tables import multi_lora_config, multi_lora_configs


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_is_listed(arch):
    rng = random.Random(0)
    known = [(r["kernel"], r["config"]) for r in multi_lora_configs(arch)]
    sizes = {(r["elem_bytes"], str(r["config"])) for r in multi_lora_configs(arch)}
    for _ in range(1000):
        m, n = (int(2 ** rng.uniform(0, 17)) for _ in range(2))
        r, size, wide = 8 * rng.randint(1, 25), rng.choice((2, 4)), rng.choice((True, False))
        for kernel, config in multi_lora_config(m, n, r, arch, elem_bytes=size, wide=wide).items():
            kernel += "" if wide or kernel == "plan" else "_odd"
            assert (kernel, config) in known, (m, n, r, kernel)
            assert kernel == "plan" or (size, str(config)) in sizes, (m, n, r, size)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_plan_cuts_tiles_of_the_shrink(arch):
    for m in (1, 64, 4096, 65536):
        cfg = multi_lora_config(m, 4096, 64, arch)
        assert cfg["plan"]["ROWS"] == cfg["shrink"]["BLOCK_M"]
        assert cfg["shrink"]["BLOCK_R"] <= 64 and cfg["shrink"]["BLOCK_R"] % 8 == 0
    few, many = (multi_lora_config(m, 4096, 64, arch)["shrink"]["BLOCK_M"] for m in (96, 65536))
    assert (few, many) == (16, 64)


def test_unknown_arch():
    with pytest.raises(ValueError, match="expected one of .* got 'sm_61'"):
        multi_lora_configs("sm_61")
