"""What every test shares: the data folder, and the accuracy rule."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
LONGEST = (  # files, a minute or more each
    "test_interpret.py",
    "test_cpu_decode.py",
    "test_installs.py",
    "test_aot.py",
    "test_simt_adapter_decode.py",
    "test_simt_prefix_decode.py",
    "test_simt_multi_lora.py",
    "test_run.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: with one of them last, a core would have nothing to do."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """What one test compiled does not count towards another's limit of recompilations.

    Every model of transformers runs through one code object (a decorator's), which holds eight.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository (or $FUSEDPEFT_DATA); skips where absent."""
    path = Path(os.environ.get("FUSEDPEFT_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data folder at {path}; set FUSEDPEFT_DATA")
    return path


def _check(name: str, got: torch.Tensor, low: torch.Tensor, ref: torch.Tensor) -> None:
    assert torch.isfinite(got).all(), f"{name}: not finite"
    err, allowed = (got.double() - ref).abs(), (low.double() - ref).abs()
    eps = torch.finfo(low.dtype).eps * ref.abs().max().clamp(min=1e-30)
    worst, bound = err.max().item(), (2 * allowed.max() + eps).item()
    assert worst <= bound, (
        f"{name}: |got - ref64| {worst:.3e} > {bound:.3e} (2 x torch's own + eps)"
    )


@pytest.fixture(scope="session")
def check_accuracy() -> Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """max|got − ref64| ≤ 2 · max|low − ref64| + eps, `low` being torch in the same precision."""
    return _check


@pytest.fixture
def lively() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Weights so large that what a model says next depends on all that it has read."""

    def lively(model: torch.nn.Module) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        return model

    return lively


@pytest.fixture(params=["flash", "aten"])
def prefix_attention_by(request, monkeypatch) -> str:
    """prefix_attention on a CPU by C++ and by ATen, whatever the threads and the chip."""
    from fusedpeft.ops.native import DTYPE_CODES, native

    module = importlib.import_module("fusedpeft.ops.prefix_attention")
    if request.param == "flash" and native is None:
        pytest.skip("fusedpeft._C is not built")

    def flashes(impl, q, k, forward=False):
        return request.param == "flash" and q.dtype in DTYPE_CODES

    monkeypatch.setattr(module, "_flashes", flashes)
    return request.param
