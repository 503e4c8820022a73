"""DoRA's norm is kept between calls, and never one moment longer than it is right."""

import copy
import gc

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import lora_dora

SCALE = 0.5


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """How often a norm was made."""
    lora_dora.forget_norms()
    calls = []
    inner = lora_dora._norm
    monkeypatch.setattr(lora_dora, "_norm", lambda *t: calls.append(1) or inner(*t))
    return calls


def make():
    g = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(s, generator=g) for s in ((24, 40), (4, 40), (24, 4)))
    m = torch.nn.Parameter(torch.rand(24, generator=g) + 0.5)
    frozen = torch.nn.Parameter(w, requires_grad=False)
    return torch.randn(9, 40, generator=g), frozen, torch.nn.Parameter(a), torch.nn.Parameter(b), m


def ours(x, w, a, b, m, scale=SCALE):
    return ops.lora_linear(x, w, a, b, scale, magnitude=m)


def is_right(x, w, a, b, m, scale=SCALE):
    want = ops.lora_linear_ref(x, w, a, b, scale, magnitude=m)
    torch.testing.assert_close(ours(x, w, a, b, m, scale), want, atol=1e-4, rtol=1e-4)


def test_made_once_for_many_calls(made):
    t = make()
    for _ in range(3):
        is_right(*t)
    with torch.no_grad():
        is_right(*t)
    assert len(made) == 1


@pytest.mark.parametrize("which", ["w", "a", "b"])
@pytest.mark.parametrize("how", ["in_place", "under_no_grad", "through_a_view", "new_data"])
def test_a_written_parameter_makes_it_anew(which, how, made):
    t = make()
    is_right(*t)
    target = t[{"w": 1, "a": 2, "b": 3}[which]]
    if how == "in_place":
        target.requires_grad_(False).mul_(1.5)
    elif how == "under_no_grad":
        with torch.no_grad():
            target.add_(0.25)
    elif how == "through_a_view":
        with torch.no_grad():
            target[0].fill_(2.0)
    else:
        target.data = target.data * 1.5
    is_right(*t)
    assert len(made) == 2


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
    ids=["sgd", "sgd-foreach", "adamw-foreach", "adamw-fused"],
)
def test_after_an_optimiser_step(optimiser, made):
    x, w, a, b, m = make()
    step = optimiser([a, b, m])
    for count in range(1, 4):
        for _ in range(2):  # two micro-batches, one norm
            ours(x, w, a, b, m).square().sum().backward()
        assert len(made) == count
        step.step()
        step.zero_grad()
    is_right(x, w, a, b, m)


def test_another_scale_or_weight_of_the_same_version(made):
    x, w, a, b, m = make()
    is_right(x, w, a, b, m)
    is_right(x, w, a, b, m, scale=2.0)
    is_right(x, torch.nn.Parameter(w.detach() * 3), a, b, m)
    is_right(x, w, copy.deepcopy(a), b, m)
    assert len(made) == 4


def test_a_new_tensor_where_an_old_one_lay(made):
    """Same address, same version, another owner."""
    x, w, a, b, m = make()
    memory = torch.randn(24, 40).numpy()
    first = torch.from_numpy(memory)
    is_right(x, first, a, b, m)
    at, version = first.data_ptr(), first._version
    del first
    gc.collect()
    memory *= 2.0
    second = torch.from_numpy(memory)
    assert (second.data_ptr(), second._version) == (at, version)
    is_right(x, second, a, b, m)
    assert len(made) == 2


def test_a_transposed_view_made_anew_in_each_call(made):
    """GPT-2's Conv1D holds [K, N]."""
    x, w, a, b, m = make()
    conv = torch.nn.Parameter(w.detach().t().contiguous(), requires_grad=False)
    for _ in range(2):
        is_right(x, conv.t(), a, b, m)
        with torch.no_grad():
            is_right(x, conv.t(), a, b, m)
    assert len(made) == 1
    with torch.no_grad():
        conv.mul_(2.0)
    is_right(x, conv.t(), a, b, m)
    assert len(made) == 2


def test_the_norm_of_the_parameters_serves_autocast(made):
    x, w, a, b, m = make()
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ours(x, w, a, b, m).dtype == torch.bfloat16
    assert len(made) == 1
    is_right(x, w, a, b, m)  # not a norm of bf16 products
    assert len(made) == 1


def test_a_quantised_base(made):
    x, w, a, b, m = make()
    q = ops.FP8Weight.quantise(w)
    ours(x, q, a, b, m)
    count = len(made)
    is_right(x, q, a, b, m)
    assert len(made) == count
    q.scale.mul_(2.0)
    is_right(x, q, a, b, m)
    assert len(made) > count


def test_gone_with_its_parameter_and_none_for_inference_tensors(made):
    x, w, a, b, m = make()
    ours(x, w, a, b, m)
    assert len(lora_dora._kept) == 1
    del b
    gc.collect()
    assert len(lora_dora._kept) == 0
    with torch.inference_mode():
        x, w, a, b, m = (t.detach().clone() for t in make())
        is_right(x, w, a, b, m)
        b.mul_(2.0)
        is_right(x, w, a, b, m)
    assert len(lora_dora._kept) == 0


def test_nothing_is_kept_or_taken_where_a_graph_is_captured(made, monkeypatch):
    x, w, a, b, m = make()
    with torch.no_grad():
        ours(x, w, a, b, m)
        monkeypatch.setattr(lora_dora, "_unknowable", lambda t: True)
        ours(x, w, a, b, m)
        ours(x, w, a, b, m)
    assert len(made) == 3


@pytest.mark.parametrize("which", [1, 2, 3])
def test_what_data_hides_is_seen_on_a_cpu_and_forgotten_on_demand(which, monkeypatch):
    t = make()
    is_right(*t)
    t[which].data.mul_(2.0)  # the version stays
    is_right(*t)
    monkeypatch.setattr(lora_dora, "_looks", lambda tensors: ())  # as on a GPU
    is_right(*t)
    t[which].data.mul_(2.0)
    lora_dora.forget_norms()
    is_right(*t)


def test_an_update_that_cancels_the_weight_is_no_nan():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 40, generator=g), torch.randn(24, 4, generator=g)
    w = -SCALE * (b @ a) + 1e-5 * torch.randn(24, 40, generator=g)
    norm = SCALE / lora_dora.dora_factor(w, a, b, SCALE, torch.tensor(SCALE))
    assert norm.isfinite().all() and (norm <= 1e-3 * w.norm(dim=1)).all()
