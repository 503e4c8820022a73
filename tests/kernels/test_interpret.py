"""Runs each *_interpret_checks.py under Triton's interpreter, in a process of its own.

The interpreter is chosen when triton is imported, for the whole process, so these checks cannot
share one with tests that compile. It runs on one core: as many files at once as there are cores.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = sorted(HERE.glob("*_interpret_checks.py"))


def run(checks: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    cmd = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    return subprocess.run(
        cmd, env=env, cwd=HERE.parents[1], capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def started(request):
    """The run of each file that was asked for, all of them on their way."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    mine = (item for item in request.session.items if item.path == Path(__file__))
    wanted = [item.callspec.params["checks"] for item in mine]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {checks: pool.submit(run, checks) for checks in wanted}


@pytest.mark.parametrize("checks", CHECKS, ids=lambda p: p.name.partition("_interpret")[0])
def test_kernels_under_the_interpreter(started, checks):
    done = started[checks].result()
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, "see the output above"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= checks.read_text().count("\ndef test_"), "not collected"
