"""Runs each *_interpret_checks.py under Triton's interpreter, in a process of its own.

The interpreter is chosen when triton is imported, for the whole process, so these checks cannot
share one with tests that compile.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = sorted(HERE.glob("*_interpret_checks.py"))


@pytest.mark.parametrize(
    "checks", CHECKS, ids=lambda p: p.name.removesuffix("_interpret_checks.py")
)
def test_kernels_under_the_interpreter(checks):
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    cmd = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(
        cmd, env=env, cwd=HERE.parents[1], capture_output=True, text=True, timeout=900
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, "see the output above"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= checks.read_text().count("\ndef test_"), "not collected"
