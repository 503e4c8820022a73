"""The counter-based mask: right rate, no structure, the same bits from C++ and torch."""

import pytest
import torch

from fusedpeft.ops.dropout import as_seed, dropout, dropout_ref, keep_mask_ref
from fusedpeft.ops.native import native


def test_rate_and_independence():
    p, rows, cols = 0.3, 1500, 2000
    first, second = (keep_mask_ref(rows, cols, p, torch.tensor([s])).double() - 0.7 for s in (1, 2))
    sd = (0.21 / (rows * cols)) ** 0.5
    assert abs(first.mean()) < 5 * sd
    for product in (first * second, first[1:] * first[:-1], first[:, 1:] * first[:, :-1]):
        assert abs(product.mean()) < 5 * sd  # seeds, rows and columns do not know of each other
    # Row sums spread as binomials do: no row is the shift of another.
    spread = first.sum(1).var() / (0.21 * cols)
    assert 0.85 < spread < 1.15


def test_depends_on_all_64_bits_of_the_seed():
    masks = [keep_mask_ref(64, 64, 0.5, torch.tensor([s])) for s in (7, 7 + 2**32, 7 + 2**62)]
    for i in range(3):
        for j in range(i):
            assert 0.4 < (masks[i] == masks[j]).double().mean() < 0.6


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (64, 100), (129, 1023)])
def test_native_mask_is_bit_equal_to_the_specification(shape, dtype):
    x = torch.randn(shape[0], shape[1] + 5).to(dtype)[:, : shape[1]]
    for seed in (0, 12345, 2**62 + 99):
        got = dropout(x, 0.37, torch.tensor([seed]))
        torch.testing.assert_close(got, dropout_ref(x, 0.37, torch.tensor([seed])))
        assert torch.equal(got == 0, ~keep_mask_ref(*shape, 0.37, torch.tensor([seed])) | (x == 0))


def test_seed_forms():
    assert torch.equal(as_seed(5, torch.device("cpu")), torch.tensor([5]))
    torch.manual_seed(0)
    first = as_seed(None, torch.device("cpu"))
    torch.manual_seed(0)
    assert torch.equal(first, as_seed(None, torch.device("cpu")))
    with pytest.raises(ValueError, match="expected 1 int64 element, got 2"):
        as_seed(torch.tensor([1, 2]), torch.device("cpu"))
