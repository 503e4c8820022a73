"""csrc/cuda/multi_lora.cu on a CPU: right for ragged shapes, mixed ranks, stacked parts and slots
that are not there, in bounds, without races, its flags zero again after each launch; and the same
program says so when the kernel is made worse."""

import re
from pathlib import Path

import pytest

SOURCE = "simt_multi_lora.cpp"
CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
RUNS = {  # the program's arguments, lines that it prints
    "address": ((), 6 + 8 + 4 + 8),  # fp32, bf16, bf16 with an fp32 pool, fp16
    "thread": (("bf16",), 8 + 4),
}

MUTANTS = {  # file, a change, the sanitizer that runs it, what must be said
    "flags_stay_up": (
        "multi_lora.cu",
        "a.flags[0] = a.flags[1] = a.flags[2] = 0;",
        "a.flags[1] = a.flags[2] = 0;",
        "address",
        "wait_for|waits for what nobody brings",
    ),
    "a_slot_that_is_not_there_is_read": (
        "multi_lora.cu",
        "slot < 0 || slot >= a.count",
        "slot < 0",
        "address",
        "heap-buffer-overflow",
    ),
    "sums_of_other_warps_read_early": (
        "multi_lora.cu",
        "__syncthreads();\n  if (place.split == 0)",
        "if (place.split == 0)",
        "thread",
        "ThreadSanitizer: data race",
    ),
}


@pytest.mark.parametrize("sanitizer", RUNS)
def test_against_float64(simt_run, sanitizer):
    args, lines = RUNS[sanitizer]
    done = simt_run(SOURCE, sanitizer, *args)
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(re.findall(r"worst [\d.]+ of the bound$", done.stdout, re.MULTILINE)) == lines


@pytest.mark.parametrize("name", MUTANTS)
def test_a_worse_kernel_is_caught(simt_run, tmp_path, name):
    file, old, new, sanitizer, said = MUTANTS[name]
    (tmp_path / "cuda").mkdir()
    for source in ("multi_lora.cu", "multi_lora_tiles.h"):
        text = (CUDA / source).read_text()
        if source == file:
            assert text.count(old) == 1
            text = text.replace(old, new)
        # Of one dtype and one number of tokens, which compiles in a fifth of the time.
        text = re.sub(
            r".*(launch<float>|launch_mma<T, 1, 1, 2|launch_mma<T, 1, [24]).*\n", "", text
        )
        text = text.replace("launch<__half>", "launch<__nv_bfloat16>")
        (tmp_path / "cuda" / source).write_text(text)
    done = simt_run(SOURCE, sanitizer, "bf16", "4", first=(tmp_path,))
    assert done.returncode != 0
    assert re.search(said, done.stdout), done.stdout[-4000:]
