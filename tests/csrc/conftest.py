"""Building C++ for these tests: a .cu file as C++ over csrc/simt, under a sanitizer."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "csrc" / "simt" / "simt.cpp"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# -O0 takes a quarter of the compiler's time, and runs are little longer; not so those under
# ThreadSanitizer, which then watches every local variable.
SANITIZERS = {
    "address": [
        "-O0",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=simt_shared",
    ],
    "thread": ["-O1", "-fsanitize=thread"],
}
# Threads that a failed launch abandons hold memory; that is no leak of the kernel's.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}


def compile_cxx(*args: str | Path) -> None:
    done = subprocess.run([CXX, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def simt_build(tmp_path_factory) -> Callable[..., Path]:
    """(source, sanitizer, first include folders) -> program; each is built once in a session.

    Skips where the compiler's sanitizer does not build or run an empty program.
    """
    folder = tmp_path_factory.mktemp("simt")
    scheduler = folder / "simt.o"  # without sanitizers, whatever the kernels have
    made: dict[tuple, Path] = {}
    broken: dict[str, str] = {}

    def probe(sanitizer: str) -> str:
        source, program = folder / "probe.cpp", folder / f"probe-{sanitizer}"
        source.write_text("int main() {}\n")
        command = [CXX, *SANITIZERS[sanitizer], str(source), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            done = subprocess.run([str(program)], capture_output=True, text=True)
        return "" if done.returncode == 0 else (done.stderr or f"exit {done.returncode}")[:200]

    def build(source: str, sanitizer: str, *first: Path) -> Path:
        if sanitizer not in broken:
            broken[sanitizer] = probe(sanitizer)
        if broken[sanitizer]:
            pytest.skip(f"-fsanitize={sanitizer} does not work here: {broken[sanitizer]}")
        key = (source, sanitizer, first)
        if key not in made:
            include = [*(f"-I{p}" for p in first), f"-I{ROOT / 'csrc'}", "-DFUSEDPEFT_SIMT"]
            if not scheduler.exists():
                compile_cxx(*FLAGS, "-O1", *include, "-c", SIMT, "-o", scheduler)
            made[key] = folder / f"{Path(source).stem}-{sanitizer}-{len(made)}"
            compile_cxx(
                *FLAGS,
                *SANITIZERS[sanitizer],
                *include,
                ROOT / "tests/csrc" / source,
                scheduler,
                "-o",
                made[key],
            )
        return made[key]

    return build


@pytest.fixture(scope="session")
def simt_run(simt_build) -> Callable[..., subprocess.CompletedProcess[str]]:
    """(source, sanitizer, *argv, first=()) -> the finished program, its two outputs in one text."""

    def run(source: str, sanitizer: str, *args: str, first: tuple[Path, ...] = ()):
        return subprocess.run(
            [str(simt_build(source, sanitizer, *first)), *args],
            env=os.environ | OPTIONS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    return run
