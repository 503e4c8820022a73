"""ranking_loss and pro_loss: golden values, references, order, rejections."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedpeft import ops


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def pro(sums, lengths, rewards, **kw):
    group = torch.zeros(len(sums), dtype=torch.int64)
    return ops.pro_loss(f64(sums), f64(lengths), f64(rewards), group, **kw).item()


def test_pro_golden_value():
    assert pro([-20, -36, -30], [10, 12, 15], [1.5, 0.25, -1]) == pytest.approx(7.20492, abs=1e-5)
    ranking_only = pro([-20, -36, -30], [10, 12, 15], [1.5, 0.25, -1], sft_weight=0.0)
    assert ranking_only == pytest.approx(1.70299 + 1.50193, abs=1e-5)


def test_golden_values_of_the_reference_file(shared_data):
    data = json.loads((shared_data / "reference" / "reference_numbers.json").read_text())
    key = next(k for k in data["pro"] if k.startswith("golden_losses"))
    seen = 0
    for row in data["pro"][key]:
        sums, lengths, rewards = row["in"]
        if rewards != sorted(rewards, reverse=True):
            continue  # the file takes candidates as given there; here they are sorted (next test)
        assert pro(sums, lengths, rewards) == pytest.approx(row["out"][2], abs=1e-6)
        seen += 1
    assert seen == 3
    key = next(k for k in data["rm_ranking_loss"] if "golden" in k)
    got = ops.ranking_loss(f64([2, 0.5, -1]), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    assert got.item() == pytest.approx(data["rm_ranking_loss"][key], abs=1e-6)


def test_pro_sorts_by_reward_first():
    """With two candidates, a mis-sorted reward would turn the target around."""
    assert pro([-20, -36], [10, 12], [0.25, 1.5]) == pytest.approx(
        pro([-36, -20], [12, 10], [1.5, 0.25])
    )
    # 1.50193 to rank the worse-scored one first, and the SFT term of the better one: 0.05 · 36.
    assert pro([-20, -36], [10, 12], [0.25, 1.5]) == pytest.approx(1.50193 + 1.8, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_batches_in_any_order_equal_the_reference(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    group = torch.cat([torch.full((n,), 17 * i - 5) for i, n in enumerate(sizes)])
    n = len(group)
    sums, lengths = (
        -30 * torch.rand(n, generator=g).double(),
        torch.randint(1, 20, (n,), generator=g),
    )
    rewards = torch.randint(-2, 3, (n,), generator=g).double()  # with ties
    order = torch.randperm(n, generator=g)
    args = [t[order] for t in (sums, lengths, rewards, group)]
    torch.testing.assert_close(ops.pro_loss(*args), ops.pro_loss_ref(*args))
    args = [t[order] for t in (sums, torch.randint(0, 3, (n,), generator=g), group)]
    torch.testing.assert_close(ops.ranking_loss(*args), ops.ranking_loss_ref(*args))


def test_gradients():
    group = torch.tensor([0, 0, 1, 1, 1, 2])
    sums, reward = -torch.rand(6).double() * 20, torch.randn(6).double()
    sums.requires_grad_()
    fn = lambda s: ops.pro_loss(s, torch.full((6,), 7), reward, group)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (sums,))
    rank = torch.tensor([0, 1, 0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda s: ops.ranking_loss(s, rank, group), (sums,))


def test_gradient_is_finite_with_ties_and_extremes():
    sums = torch.tensor([-1.0, -900.0, -900.0], requires_grad=True)
    loss = ops.pro_loss(sums, torch.ones(3), torch.tensor([0.0, 0.0, 50.0]), torch.zeros(3).long())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(sums.grad).all()


def test_empty_and_single():
    none = torch.empty(0)
    assert ops.pro_loss(none, none, none, none.long()) == 0
    assert ops.ranking_loss(none, none, none.long()) == 0
    one = torch.ones(1)
    assert ops.pro_loss(-one, one, one, one.long()) == 0
    assert ops.ranking_loss(one, one, one.long()) == 0


def test_compiles_whole():
    args = (torch.randn(4), torch.ones(4), torch.randn(4), torch.tensor([0, 0, 1, 1]))
    compiled = torch.compile(ops.pro_loss, fullgraph=True)(*args)
    torch.testing.assert_close(compiled, ops.pro_loss(*args))


@pytest.mark.parametrize(
    "args, error, message",
    [
        (
            (torch.ones(3), torch.ones(2), torch.ones(3).long()),
            ValueError,
            r"rank: .*\[3\], got \[2\]",
        ),
        ((torch.ones(3), torch.ones(3), torch.ones(3)), TypeError, "group: expected an integer"),
        (
            (torch.ones(3).long(), torch.ones(3), torch.ones(3).long()),
            TypeError,
            "scores: expected",
        ),
        (
            ([1.0], torch.ones(1), torch.ones(1).long()),
            TypeError,
            "scores: expected a Tensor, got list",
        ),
        (
            (torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2).long()),
            ValueError,
            r"expected \[n\]",
        ),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        ops.ranking_loss(*args)
