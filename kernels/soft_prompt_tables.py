"""Which blocks the soft-prompt kernels take: pure functions, all listed for compilation."""

from __future__ import annotations

from fusedpeft.kernels.device import ARCHS

# Eight loads are on their way at once, and a short prompt still gives every SM a block.
BWD_CONFIG = dict(BLOCK_B=8, BLOCK_D=256, num_warps=4, num_stages=1)


def soft_prompt_fwd_config(d: int) -> dict:
    """A block covers a row, up to 2048 columns: eight 16-bit elements a thread and load."""
    block = min(2048, max(128, 1 << (d - 1).bit_length()))
    return dict(BLOCK_D=block, num_warps=max(1, block // 256), num_stages=1)


def soft_prompt_configs(arch: str) -> list[dict]:
    """Every (kernel, flags, config) that the launchers can choose on `arch`, each once."""
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {ARCHS}, got {arch!r}")
    configs = [("fwd", soft_prompt_fwd_config(d)) for d in (128, 256, 512, 1024, 2048)]
    sizes = ((2, 2), (2, 4), (4, 4))  # of the table's elements, of the prompt's
    return [
        dict(
            kernel=kernel, elem_bytes=elem, adapter_bytes=adapter, flags={"BY_ID": by_id},
            config=config,
        )
        for kernel, config in [*configs, ("bwd", BWD_CONFIG)]
        for elem, adapter in sizes
        for by_id in (False, True)
    ]  # fmt: skip
