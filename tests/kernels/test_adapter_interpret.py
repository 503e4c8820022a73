"""Runs adapter_interpret_checks.py in a process of its own (see there)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "adapter_interpret_checks.py"


def test_kernels_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    root = CHECKS.parents[2]
    cmd = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(cmd, env=env, cwd=root, capture_output=True, text=True, timeout=600)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, "see the output above"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 50, "checks were not collected"
