"""Every configuration compiles for every chip, without a GPU, and keeps within its means."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from fusedpeft.bench.aot import OLDEST, problems
from fusedpeft.bench.sources import code_hash
from fusedpeft.kernels.aot import OPS, configs, specs
from fusedpeft.kernels.device import ARCHS

ROOT = Path(__file__).parents[2]
FIGURES = {"registers", "spills", "scalar_spills", "shared_bytes", "blocks_per_sm", "wgmma", "tma"}


def run(*args: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, with the interpreter off."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cmd = [sys.executable, "-m", "fusedpeft.bench.aot", *args]
    env["PYTHONSAFEPATH"] = "1"
    return subprocess.run(cmd, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_a_sample_compiles_as_the_committed_tables_say():
    """Every eighth row of all ops. With the next test it speaks for the others too."""
    done = run("--every", "8", "--check")
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert sum(line.startswith("| ") for line in done.stdout.splitlines()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_configuration_compiles_as_the_committed_table_says(op):
    done = run("--op", op, "--check")
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0


@pytest.mark.parametrize("version", ["3.7.", "3.6."])
@pytest.mark.parametrize("op", OPS)
def test_the_committed_tables_are_of_this_code(op, version):
    """All rows that the heuristics can choose, compiled from these kernels, and without fault, by
    the Triton that the tests run with and by the oldest that we support."""
    hint = f"with triton {version}*, run: python -m fusedpeft.bench.aot --op {op} --save"
    folder = ROOT / "bench/results/aot" / (OLDEST if OLDEST.endswith(version[:-1]) else "")
    table = json.loads((folder / f"{op}.json").read_text())
    rows = table["rows"]
    assert table["triton"].startswith(version)
    assert table["code"] == code_hash(op, ROOT), hint
    assert all(r["op"] == op for r in rows)
    for arch in ARCHS:
        committed = [r for r in rows if r["arch"] == arch]
        bare = [{k: r[k] for k in r if k not in FIGURES | {"op", "arch"}} for r in committed]
        assert bare == configs(op, arch), hint
    assert not [(r, p) for r in rows if (p := problems(r))]
    assert all(r["registers"] > 0 and r["spills"] == 0 and r["blocks_per_sm"] >= 1 for r in rows)
    hopper = [r for r in rows if r["arch"] == "sm_90" and r["elem_bytes"] == 2]
    products = [k for k, spec in specs(op).items() if spec.wgmma]
    big = [r for r in hopper if r["kernel"] in products and r["config"]["BLOCK_M"] >= 64]
    assert {r["kernel"] for r in big} == set(products) and all(r["wgmma"] for r in big)
    assert not any(r["wgmma"] for r in rows if r["arch"] != "sm_90")


def test_the_hash_is_of_code_and_not_of_words(tmp_path):
    (tmp_path / "kernels").mkdir()
    spec, tables = (tmp_path / "kernels" / f"toy_{end}.py" for end in ("aot", "tables"))
    spec.write_text('"""Words."""\nfrom fusedpeft.kernels import toy_tables\n')
    tables.write_text("TILE = 64  # words\n")
    before = code_hash("toy", tmp_path)
    spec.write_text('"""Others."""\nfrom fusedpeft.kernels import toy_tables  # and more\n')
    assert code_hash("toy", tmp_path) == before
    tables.write_text("TILE = 128\n")
    assert code_hash("toy", tmp_path) != before


def test_problems_are_found():
    good = dict(op="lora", kernel="gemm", arch="sm_90", elem_bytes=2, config={"BLOCK_M": 128})
    good |= dict(spills=0, shared_bytes=232448, blocks_per_sm=1, wgmma=True)
    assert problems(good) == []
    assert problems({**good, "spills": 8}) == ["8 spilled"]
    assert problems({**good, "shared_bytes": 232449}) == ["232449 > 232448 shared bytes"]
    assert problems({**good, "wgmma": False}) == ["no wgmma"]
    assert problems({**good, "tma": False}) == ["no TMA"]
    assert problems({**good, "blocks_per_sm": 0}) == ["does not fit an SM"]


def test_the_interpreter_is_refused():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    cmd = [sys.executable, "-m", "fusedpeft.bench.aot", "--arch", "sm_90"]
    done = subprocess.run(cmd, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr
