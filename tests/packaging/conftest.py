"""An sdist of this tree, a wheel built from it, and virtual environments that see the dependencies
of the environment that runs the tests, but not its fusedpeft."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEPENDENCIES = Path(torch.__file__).parents[1]
BUILT = ("setup.py", "pyproject.toml", "MANIFEST.in", "csrc", "pyext", "kernels", "bench")
BESIDE = ("README.md", "LICENSE", "constraints.txt", "Makefile")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--quiet")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Output of a command, outside git, without a CUDA half and without PYTHONSAFEPATH."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    # One ninja for every environment: another version would not trust its log, and build all again.
    clean["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), clean["PATH"]])
    # Not optimised, which is built sooner: how fast the kernels are is not asked here.
    own = {"FUSEDPEFT_CUDA": "0", "CXXFLAGS": "-O0", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean | own | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def clean_run():
    return run


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter that runs the tests, with its own install of fusedpeft."""
    return Path(sys.executable)


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> SimpleNamespace:
    """.sdist (archive), .unpacked (its folder, in which .wheel was built; no git there)."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results", "*.egg-info")
    for name in (*BUILT, *(n for n in BESIDE if (ROOT / n).exists())):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
    run(*build, "--sdist", tree, cwd=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(*build, "--wheel", unpacked, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return SimpleNamespace(sdist=sdist, unpacked=unpacked, wheel=wheel, tree=tree)


@pytest.fixture(scope="session")
def fresh_venv(tmp_path_factory):
    """() -> the interpreter of a new virtual environment over DEPENDENCIES."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("venv")
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
        (site,) = folder.glob("lib/python*/site-packages")
        # A plain path: .pth files over there, such as that of an editable install, are not read.
        (site / "dependencies.pth").write_text(f"{DEPENDENCIES}\n")
        return folder / "bin" / "python"

    return make


@pytest.fixture(scope="session", params=["wheel", "editable"])
def installed(request, built, fresh_venv) -> tuple[str, Path]:
    """(how it was installed, interpreter)."""
    python = fresh_venv()
    what = ["-e", str(built.unpacked)] if request.param == "editable" else [str(built.wheel)]
    install = ("--python", python, "install", "--no-deps", "--no-build-isolation")
    run(*PIP, *install, *what, cwd=python.parent)
    return request.param, python
