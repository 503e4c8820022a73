"""csrc/pool.h: threads that load, replace, evict and use slots, under sanitizers; and the same
program says so when the table is changed for the worse."""

import re
from pathlib import Path

import pytest

SOURCE = "pool_driver.cpp"
TABLE = Path(__file__).resolve().parents[2] / "csrc" / "pool.h"
LOCK = "const std::lock_guard<std::mutex> lock(mutex_);"

MUTANTS = {  # a change, the sanitizer that runs it, what must be said
    "acquire_without_the_lock": (
        f"acquire(const std::vector<std::string>& names) {{\n    {LOCK}",
        "acquire(const std::vector<std::string>& names) {",
        "thread",
        "ThreadSanitizer: data race",
    ),
    "a_held_slot_is_taken": (
        "slot.state == kLive && slot.holds == 0",
        "slot.state == kLive",
        "thread",
        "ThreadSanitizer: data race|WRONG",
    ),
    "retired_is_wiped_while_held": (
        "if (slots_[index].holds > 0) return kNone;",
        "",
        "thread",
        "ThreadSanitizer: data race|WRONG",
    ),
    "a_wrong_release_is_half_done": (
        "if (indices[i] != kNone) ++slots_[indices[i]].holds;",
        ";",
        "address",
        "WRONG: a release that was refused",
    ),
}


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_threads(simt_run, sanitizer):
    done = simt_run(SOURCE, sanitizer)
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.endswith("wrong 0\n")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_worse_table_is_caught(simt_run, tmp_path, name):
    old, new, sanitizer, said = MUTANTS[name]
    text = TABLE.read_text()
    assert text.count(old) == 1
    (tmp_path / "pool.h").write_text(text.replace(old, new))
    done = simt_run(SOURCE, sanitizer, first=(tmp_path,))
    assert done.returncode != 0
    assert re.search(said, done.stdout), done.stdout[-4000:]
