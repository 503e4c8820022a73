"""csrc/cuda/adapter_decode.cu on a CPU: right for ragged shapes, shared slots, slots that are not
there and launches one after the other, in bounds, without races; and the same program says so when
the kernel is made worse."""

import re
from pathlib import Path

import pytest

SOURCE = "simt_adapter_decode.cpp"
CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
SHAPES, PAIRS = 10, 5  # in the program: cases, dtypes of x and of the adapters

MUTANTS = {  # file, a change, what must be said
    "nothing": ("adapter_decode.cu", "", "", None),
    "no_barrier_before_h": (
        "adapter_decode.cu",
        "  __syncthreads();\n#pragma unroll 1\n  for (int from = first;",
        "#pragma unroll 1\n  for (int from = first;",
        "ThreadSanitizer: data race",
    ),
    "a_copy_is_not_left_empty": (
        "adapter_decode.cu",
        "store_relaxed(from, kEmpty);",
        "",
        "WRONG",
    ),
    "a_copy_is_not_filled": (
        "adapter_decode.cu",
        "i < n * count * copies; i",
        "i < n * count * (copies - 1); i",
        "waits for what nobody brings",
    ),
    "only_the_first_leads": (
        "adapter_tokens.h",
        "if (before % kTokens == 0) first = i;",
        "if (before == 0) first = i;",
        "WRONG|data race|waits for what",
    ),
    "a_free_slot_is_not_nan": ("adapter_decode.cu", "if (size < 0) y = NAN;", "", "WRONG"),
}


def test_in_bounds_and_right(simt_run):
    done = simt_run(SOURCE, "address")
    assert done.returncode == 0, done.stdout[-4000:]
    found = re.findall(r"worst [\d.]+ of the bound$", done.stdout, re.MULTILINE)
    assert len(found) == SHAPES * PAIRS


@pytest.mark.parametrize("name", MUTANTS)
def test_without_races_and_a_worse_kernel_is_caught(simt_run, tmp_path, name):
    """In fp32 alone, which compiles in a tenth of the time."""
    file, old, new, said = MUTANTS[name]
    (tmp_path / "cuda").mkdir()
    for source in ("adapter_decode.cu", "adapter_tokens.h"):
        text = (CUDA / source).read_text()
        if source == file and old:
            assert text.count(old) == 1
            text = text.replace(old, new)
        text = re.sub(r"launch<(__nv_bfloat16|__half), \w+>", "launch<float, float>", text)
        (tmp_path / "cuda" / source).write_text(text)
    done = simt_run(SOURCE, "thread", "fp32", first=(tmp_path,))
    assert (done.returncode == 0) == (said is None), done.stdout[-4000:]
    if said is None:
        found = re.findall(r"worst [\d.]+ of the bound$", done.stdout, re.MULTILINE)
        assert len(found) == SHAPES
    else:
        assert re.search(said, done.stdout), done.stdout[-4000:]
