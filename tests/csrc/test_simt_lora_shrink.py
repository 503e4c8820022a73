"""csrc/cuda/lora_shrink.cu on a CPU: right for ragged shapes, in bounds, without races; and the
same program says so when the kernel is changed for the worse."""

import re
from pathlib import Path

import pytest

SOURCE = "simt_lora_shrink.cpp"
KERNEL = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "lora_shrink.cu"
CASES = 12 * 5  # shapes in the program, dtype pairs

MUTANTS = {  # a change, the sanitizer that runs it, what must be said
    "no_barrier": ("__syncthreads();", ";", "thread", "ThreadSanitizer: data race"),
    "rank_not_clamped": ("min(rank0 + j, r - 1)", "(rank0 + j)", "address", "heap-buffer-overflow"),
    "alignment_not_checked": (
        "% 16 == 0 && stride * sizeof(T) % 16 == 0",
        "% 4 == 0 && stride * sizeof(T) % 4 == 0",
        "address",
        "misaligned address",
    ),
    "tail_lost": ("at < k; at +=", "at < whole; at +=", "address", "WRONG"),
}


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_against_float64(simt_run, sanitizer):
    done = simt_run(SOURCE, sanitizer)
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(re.findall(r"worst [\d.]+ of the bound$", done.stdout, re.MULTILINE)) == CASES


@pytest.mark.parametrize("name", MUTANTS)
def test_a_worse_kernel_is_caught(simt_run, tmp_path, name):
    old, new, sanitizer, said = MUTANTS[name]
    text = KERNEL.read_text()
    assert text.count(old) == 1
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "lora_shrink.cu").write_text(text.replace(old, new))
    done = simt_run(SOURCE, sanitizer, first=(tmp_path,))
    assert done.returncode != 0
    assert re.search(said, done.stdout), done.stdout[-4000:]
