"""What is given for a number: refused alike with gradients and without, in a few rows and many."""

import pytest
import torch

from fusedpeft import ops

BAD = [(float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError), (None, TypeError)]


def lora_multi(rows: int, scale):
    w, a, b = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    return ops.lora_linear_multi(torch.randn(rows, 8), [w], [a], [b], [scale], [None])


def adapter(rows: int, **given):
    down, up = torch.randn(4, 8), torch.randn(8, 4)
    return ops.bottleneck_adapter(torch.randn(rows, 8), down, None, up, None, **given)


CALLS = {
    "scale": lora_multi,
    "scale ": lambda rows, value: adapter(rows, scale=value),
    "norm_eps": lambda rows, value: adapter(rows, norm="layer_norm", norm_eps=value),
    "dropout_p": lambda rows, value: adapter(rows, dropout_p=value),
    "temperature": lambda rows, value: ops.linear_logprob(
        torch.randn(rows, 8), torch.randn(6, 8), torch.zeros(rows).long(), temperature=value
    ),
    "sft_weight": lambda rows, value: ops.pro_loss(
        *(torch.ones(rows) for _ in range(3)), torch.zeros(rows).long(), sft_weight=value
    ),
}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("value, error", BAD)
@pytest.mark.parametrize("name", CALLS)
def test_a_number_that_is_none(name, value, error, rows):
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match="expected .*, got") as caught:
            CALLS[name](rows, value)
        assert name.strip() in str(caught.value) and "\n" not in str(caught.value)


def test_losses_over_candidates():
    n, one = torch.zeros(3).long(), torch.ones(3)
    with pytest.raises(ValueError, match="length: expected tokens, at least 1, got 0.0"):
        ops.pro_loss(one, torch.tensor([3.0, 0.0, 2.0]), one, n)
    with pytest.raises(TypeError, match="reward: expected a real dtype, got torch.complex64"):
        ops.pro_loss(one, one, one.to(torch.complex64), n)
    with pytest.raises(TypeError, match="rank: expected a real dtype, got torch.complex64"):
        ops.ranking_loss(one, one.to(torch.complex64), n)


def test_packed_sequences_of_no_dimension():
    q, p = torch.randn(1, 2, 5, 8), torch.randn(2, 3, 8)
    with pytest.raises(
        ValueError, match=r"cu_seqlens: expected B = 1 \(packed\) and \[n \+ 1\], got"
    ):
        ops.prefix_attention(q, q, q, p, p, cu_seqlens=torch.tensor(5))
