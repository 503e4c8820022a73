"""Runs lora_multi_interpret_checks.py under Triton's interpreter, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "lora_multi_interpret_checks.py"


def test_kernels_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    cmd = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    root = CHECKS.parents[2]
    done = subprocess.run(cmd, env=env, cwd=root, capture_output=True, text=True, timeout=600)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, "see the output above"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 44, "checks were not collected"
