"""Every configuration compiles for every chip, without a GPU, and keeps within its means."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from fusedpeft.bench.aot import problems
from fusedpeft.kernels.aot import OPS, configs, specs
from fusedpeft.kernels.device import ARCHS

ROOT = Path(__file__).parents[2]
FIGURES = {"registers", "spills", "scalar_spills", "shared_bytes", "blocks_per_sm", "wgmma"}


def run(*args: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, with the interpreter off."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cmd = [sys.executable, "-m", "fusedpeft.bench.aot", *args]
    env["PYTHONSAFEPATH"] = "1"
    return subprocess.run(cmd, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("op", OPS)
def test_every_configuration_compiles_and_fits(op, tmp_path):
    done = run("--op", op, "--check", "--json", str(tmp_path / "aot.json"))
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0
    rows = json.loads((tmp_path / "aot.json").read_text())["rows"]
    assert len(rows) == sum(len(configs(op, arch)) for arch in ARCHS)
    assert all(r["registers"] > 0 and r["spills"] == 0 and r["blocks_per_sm"] >= 1 for r in rows)
    hopper = [r for r in rows if r["arch"] == "sm_90" and r["elem_bytes"] == 2]
    products = [k for k, spec in specs(op).items() if spec.wgmma]
    big = [r for r in hopper if r["kernel"] in products and r["config"]["BLOCK_M"] >= 64]
    assert {r["kernel"] for r in big} == set(products) and all(r["wgmma"] for r in big)
    assert not any(r["wgmma"] for r in rows if r["arch"] != "sm_90")


@pytest.mark.parametrize("op", OPS)
def test_the_committed_table_is_of_these_configurations(op):
    """bench/results/aot/OP.json is made by the command; a changed table must be measured again."""
    file = ROOT / "bench/results/aot" / f"{op}.json"
    rows = json.loads(file.read_text())["rows"]
    hint = f"run: python -m fusedpeft.bench.aot --op {op} --json {file}"
    assert all(r["op"] == op for r in rows)
    for arch in ARCHS:
        committed = [r for r in rows if r["arch"] == arch]
        bare = [{k: r[k] for k in r if k not in FIGURES | {"op", "arch"}} for r in committed]
        assert bare == configs(op, arch), hint


def test_problems_are_found():
    good = dict(op="lora", kernel="gemm", arch="sm_90", elem_bytes=2, config={"BLOCK_M": 128})
    good |= dict(spills=0, shared_bytes=232448, blocks_per_sm=1, wgmma=True)
    assert problems(good) == []
    assert problems({**good, "spills": 8}) == ["8 spilled"]
    assert problems({**good, "shared_bytes": 232449}) == ["232449 > 232448 shared bytes"]
    assert problems({**good, "wgmma": False}) == ["no wgmma"]
    assert problems({**good, "blocks_per_sm": 0}) == ["does not fit an SM"]


def test_the_interpreter_is_refused():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    cmd = [sys.executable, "-m", "fusedpeft.bench.aot", "--arch", "sm_90"]
    done = subprocess.run(cmd, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr
