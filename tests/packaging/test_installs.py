"""sdist, wheel and editable install: everything is there and nothing shadows a neighbour."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = {"pyext": "fusedpeft", "kernels": "fusedpeft/kernels", "bench": "fusedpeft/bench"}

PROBE = """
import importlib.metadata, importlib.resources, importlib.util, json, sys
import torch
import fusedpeft, fusedpeft.kernels, fusedpeft.bench.cli
from fusedpeft import ops
from fusedpeft.ops.native import native
x, w, a, b = torch.randn(2, 8), torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)
y = ops.lora_linear(x, w, a, b, 0.5, impl="native")
data = importlib.resources.files("fusedpeft.evaluate")
page = importlib.resources.files("fusedpeft.serve") / "page.html"
print(json.dumps({
    "file": fusedpeft.__file__,
    "close": bool(torch.allclose(y, ops.lora_linear_ref(x, w, a, b, 0.5), atol=1e-5)),
    "version": [fusedpeft.__version__, importlib.metadata.version("fusedpeft")],
    "cuda": native.build_info()["cuda"],
    "data": sorted(p.name for p in (*data.iterdir(), *(data / "tasks").iterdir(), page)),
    "shadowed": importlib.util.find_spec("kernels") is not None,
}))
"""


def sources(tree: Path) -> set[str]:
    """Where each file of the packages must lie when installed."""
    found = set()
    for place, package in PLACES.items():
        for path in (tree / place).rglob("*"):
            if path.is_file() and (path.suffix == ".py" or place == "pyext"):
                found.add(f"{package}/{path.relative_to(tree / place)}")
    return found


def test_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {str(p.relative_to(built.tree)) for p in built.tree.glob("csrc/**/*") if p.is_file()}
    assert {Path(n).suffix for n in csrc} == {".h", ".cpp", ".cu"}
    assert csrc | {"setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt"} <= names
    assert not [n for n in names if n.endswith((".o", ".so", ".pyc"))]


def test_wheel_holds_the_packages_and_nothing_else(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    (extension,) = (n for n in names if n.endswith(".so"))
    assert re.fullmatch(r"fusedpeft/_C\.cpython-3\d+-\S+\.so", extension)
    assert names - {extension} == sources(built.tree)
    assert re.search(r"-cp3\d+-cp3\d+-linux_\w+\.whl$", built.wheel.name)


def test_imports_and_runs(installed, built, clean_run, tmp_path):
    how, python = installed
    found = json.loads(clean_run(python, "-c", PROBE, cwd=tmp_path))
    there = Path(found["file"]).resolve()
    assert (
        built.unpacked.resolve() in there.parents
        if how == "editable"
        else "site-packages" in (str(there))
    )
    assert found["close"] and found["cuda"] is False and not found["shadowed"]
    assert found["version"][0] == found["version"][1]
    assert {"style.css", "page.html", "mmlu.yaml", "hellaswag.yaml"} <= set(found["data"])


def test_command_line_starts(installed, clean_run, tmp_path):
    _, python = installed
    assert "doctor" in clean_run(python.parent / "fusedpeft", "--help", cwd=tmp_path)


TRANSFORMERS = """
import sys
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
import fusedpeft.kernels
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=8,
                     num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(config)
out = model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, min_new_tokens=2,
                     do_sample=False, pad_token_id=0)
print(out.shape[1], is_kernels_available(), sys.path[0] == "")
"""


@pytest.mark.parametrize("where", ["repository root", "elsewhere"])
@pytest.mark.parametrize("safe_path", [False, True])
def test_transformers_works_beside_our_folder_kernels(
    python, clean_run, tmp_path, where, safe_path
):
    """It probes for a distribution of that name, and from the root our folder is found first."""
    cwd = ROOT if where == "repository root" else tmp_path
    env = {"PYTHONSAFEPATH": "1"} if safe_path else {}
    said = clean_run(python, "-c", TRANSFORMERS, cwd=cwd, **env).split()
    there = clean_run(python, "-c", FIND, cwd=tmp_path, PYTHONSAFEPATH="1").strip() != "None"
    assert said == ["4", str(there), str(not safe_path)]


FIND = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec and spec.origin)
"""


@pytest.mark.parametrize("where", ["repository root", "elsewhere"])
def test_a_distribution_named_kernels_is_the_one_imported(python, clean_run, tmp_path, where):
    """With PYTHONSAFEPATH, as in the Makefile; an install of ours has no such name."""
    theirs = tmp_path / "site" / "kernels" / "__init__.py"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("")
    root = where == "repository root"
    env = {"PYTHONPATH": str(tmp_path / "site")}
    here = ROOT if root else tmp_path
    assert clean_run(python, "-c", FIND, cwd=here, PYTHONSAFEPATH="1", **env).strip() == str(theirs)
    ours = str(ROOT / "kernels" / "__init__.py")
    found = clean_run(python, "-c", FIND, cwd=here, **env).strip()
    assert found == (ours if root else str(theirs))  # the trap is there without it


def test_no_triton_no_difference_on_a_cpu(python, clean_run, tmp_path):
    script = """
import sys
sys.modules["triton"] = None  # `import triton` raises ModuleNotFoundError
import torch, fusedpeft, fusedpeft.kernels, fusedpeft.doctor
from fusedpeft import ops
import fusedpeft.layers
x = torch.randn(40, 8, requires_grad=True)
ops.lora_linear(x, torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2), 0.5).sum().backward()
print(x.grad.shape == x.shape)
"""
    assert clean_run(python, "-c", script, cwd=tmp_path).split() == ["True"]


def test_ready_is_made_again_when_csrc_changes(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "csrc/cuda/old.cu",
        ".venv/.ready",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1000, 2000 if name.endswith(".ready") else 1000))

    def ready() -> bool:
        done = subprocess.run(["make", "-q", ".venv/.ready"], cwd=tmp_path, capture_output=True)
        return done.returncode == 0

    assert ready()
    (tmp_path / "csrc/cuda/new.h").write_text("")  # its time is now
    assert not ready()
