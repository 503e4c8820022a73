"""The blocks of the soft-prompt kernels: all listed. No triton needed."""

import pytest

from fusedpeft.kernels.device import ARCHS
from fusedpeft.kernels.soft_prompt_tables import soft_prompt_configs, soft_prompt_fwd_config


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_is_listed(arch):
    rows = soft_prompt_configs(arch)
    assert len({str(r) for r in rows}) == len(rows)
    known = [r["config"] for r in rows if r["kernel"] == "fwd"]
    for d in (*range(1, 5000, 37), 8192, 65536):
        config = soft_prompt_fwd_config(d)
        assert config in known and (config["BLOCK_D"] >= d or config["BLOCK_D"] == 2048)


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match="arch: expected one of"):
        soft_prompt_configs("sm_1")
