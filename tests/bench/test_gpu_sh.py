"""bench/gpu.sh without a GPU: it says so at once, and its plumbing runs over CPU cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedpeft.bench.ledger import load_results
from fusedpeft.doctor import diagnose, doctor

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"


def run(timeout, *args, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ("OUT", "FUSEDPEFT_GPU_DRYRUN")}
    return subprocess.run(
        ["bash", str(SCRIPT), *args],
        env=clean | {"PYTHON": sys.executable} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_syntax():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_an_unknown_part_is_named():
    done = run(30, "everything", FUSEDPEFT_GPU_DRYRUN="1")
    assert done.returncode == 2
    assert "expected tests, bench or nothing, got everything" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_stops_at_once(tmp_path):
    done = run(30, OUT=str(tmp_path / "out"))
    assert done.returncode == 3
    assert "no CUDA device: nothing to verify" in done.stdout
    assert not (tmp_path / "out").exists()


def test_dry_run_goes_through_every_step(tmp_path):
    done = run(500, OUT=str(tmp_path / "out"), FUSEDPEFT_GPU_DRYRUN="1")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert "dry run: no GPU was used, nothing is verified" in done.stdout
    for name in ("build", "environment", "tests", "results", "bench_lora", "ledger"):
        assert f"  {name}: passed" in done.stdout
    assert {t["outcome"] for t in json.loads((out / "tests.json").read_text())} == {"passed"}
    assert json.loads((out / "lora.json").read_text())[0]["impl"] == "fusedpeft"
    environment = json.loads((out / "environment.json").read_text())
    assert environment["cuda"] is False
    assert environment["versions"]["torch"] == torch.__version__
    assert (out / "summary.log").read_text().endswith("all steps passed\n")
    # The same files in a results folder would verify nothing.
    place = tmp_path / "bench" / "results" / "cpu"
    place.parent.mkdir(parents=True)
    out.rename(place)
    (result,) = load_results(tmp_path)
    assert result.environment["cuda"] is False and "lora" in result.rows


def test_a_failed_step_does_not_stop_the_next(tmp_path):
    broken = tmp_path / "python"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in "-m pytest"*) exit 7;; *"bench lora"*) exit 9;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    broken.chmod(0o755)
    done = run(60, OUT=str(tmp_path / "out"), FUSEDPEFT_GPU_DRYRUN="1", PYTHON=str(broken))
    assert done.returncode == 1
    assert "tests: FAILED (exit 7" in done.stdout
    assert "bench_lora: FAILED (exit 9" in done.stdout
    assert "ledger: passed" in done.stdout and "SOME STEPS FAILED" in done.stdout


def test_no_time_left_is_a_failure(tmp_path):
    done = run(60, OUT=str(tmp_path / "out"), FUSEDPEFT_GPU_DRYRUN="1", LIMIT_S="28")
    assert done.returncode == 1
    assert "no time left of 28 s" in done.stdout


def test_doctor_asks_the_real_dispatch(capsys):
    found = diagnose()
    assert found["versions"]["torch"] == torch.__version__
    rows = {o["case"]: o for o in found["ops"] if o["op"] == "lora_linear"}
    decode = rows["CPU, 1-16 tokens, no grad"]
    assert decode["impl"] == ("native" if found["extension"]["built"] else "aten")
    assert rows["CPU, training"]["impl"] == "aten"
    if found["versions"]["triton"] is None:
        assert rows["CUDA fwd, 64 tokens, 4096², R 16, bf16"]["impl"] == "raises"
    assert rows["CUDA fwd, 1024 tokens, 4096², R 16, fp32"]["impl"] == "cublas"
    doctor(json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    doctor()
    printed = capsys.readouterr().out
    assert "Which implementation each op takes here" in printed and "pro_loss" in printed
