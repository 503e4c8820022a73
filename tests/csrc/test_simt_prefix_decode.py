"""csrc/cuda/prefix_decode.cu on a CPU: right for ragged shapes, shared slots, blocks and windows,
in bounds, without races; and the same program says so when the kernel is made worse."""

import re
from pathlib import Path

import pytest

SOURCE = "simt_prefix_decode.cpp"
CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
CASES = 8 * 3  # shapes in the program, dtypes

MUTANTS = {  # file, a change, the sanitizer that runs it, what must be said
    "no_wait_for_keys": (
        "prefix_decode.cu",
        "cp_async_wait<1>();\n    __syncwarp();\n    float s",
        "__syncwarp();\n    float s",
        "address",
        "AddressSanitizer|WRONG",
    ),
    "fetched_over_keys_in_use": (
        "prefix_decode.cu",
        "    __syncwarp();\n    place =",
        "    place =",
        "thread",
        "ThreadSanitizer: data race",
    ),
    "a_free_slot_is_read": (
        "prefix_unit.h",
        "slot >= 0 && slot < a.slot_count ?",
        "slot >= 0 ?",
        "address",
        "heap-buffer-overflow",
    ),
    "only_the_first_leads": (
        "prefix_unit.h",
        "before % together ?",
        "before ?",
        "address",
        "WRONG",
    ),
}


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_against_float64(simt_run, sanitizer):
    done = simt_run(SOURCE, sanitizer)
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(re.findall(r"worst [\d.]+ of the bound$", done.stdout, re.MULTILINE)) == CASES


@pytest.mark.parametrize("name", MUTANTS)
def test_a_worse_kernel_is_caught(simt_run, tmp_path, name):
    file, old, new, sanitizer, said = MUTANTS[name]
    (tmp_path / "cuda").mkdir()
    for source in ("prefix_decode.cu", "prefix_unit.h"):
        text = (CUDA / source).read_text()
        if source == file:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "cuda" / source).write_text(text)
    done = simt_run(SOURCE, sanitizer, first=(tmp_path,))
    assert done.returncode != 0
    assert re.search(said, done.stdout), done.stdout[-4000:]
