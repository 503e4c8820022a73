"""LoRASlots: what is put in comes out, where the layout says, and what does not fit is refused."""

import pytest
import torch

from fusedpeft.ops.slots import empty_lora_slots, lora_slots, row_stride

A, B = torch.randn(3, 10), torch.randn(6, 3)


def test_the_layout():
    """B of part 1 begins at max_rank·N_0, its rows row_stride(R) apart, zeros beyond R."""
    q, v = (torch.randn(5, 10), torch.randn(6, 5), 2.0), (A[:1], torch.randn(4, 1), 3.0)
    pool = lora_slots([None, [q, v]], max_rank=9, slots=4)
    assert pool.a.shape == (4, 2 * 16, 10) and pool.b.shape == (4, 10 * 16)
    assert pool.rank.tolist() == [[-1, -1], [5, 1], [-1, -1], [-1, -1]]
    assert pool.max_rank == 16 and pool.sizes == (6, 4) and row_stride(5) == 8
    assert torch.equal(pool.a[1, :5], q[0]) and torch.equal(pool.a[1, 16:17], v[0])
    first, second = pool.b[1, : 6 * 8].view(6, 8), pool.b[1, 96 : 96 + 4 * 8].view(4, 8)
    assert torch.equal(first[:, :5], q[1]) and not first[:, 5:].any()
    assert torch.equal(second[:, :1], v[1]) and not second[:, 1:].any()
    for got, want in zip(pool.get(1), (q, v), strict=True):
        assert torch.equal(got.a, want[0]) and torch.equal(got.b, want[1]) and got.scale == want[2]


def test_a_part_without_an_update_has_rank_0():
    pool = lora_slots([[(A, B, 1.0), None], [None, (A, B, 2.0)]])
    assert pool.rank.tolist() == [[3, 0], [0, 3]] and pool.get(0)[1].b.shape == (6, 0)


def test_dtype_and_a_smaller_adapter_after_a_larger_one():
    pool = lora_slots([(A, B, 1.0)], dtype=torch.bfloat16)
    where = [t.data_ptr() for t in pool[:4]]
    pool.put(0, [(A[:1], B[:, :1], 4.0)])
    assert torch.equal(pool.get(0)[0].a, A[:1].bfloat16()) and not pool.a[0, 1:].any()
    assert torch.equal(pool.b[0].nonzero()[:, 0], torch.arange(0, 48, 8))
    pool.put(0, None)
    assert not pool.a.any() and not pool.b.any() and pool.rank.tolist() == [[-1]]
    assert where == [t.data_ptr() for t in pool[:4]]


@pytest.mark.parametrize(
    "slot, parts, message",
    [
        (2, [(A, B, 1.0)], r"slot: expected 0..1, got 2"),
        (-1, None, r"slot: expected 0..1, got -1"),
        (0, [(A, B, 1.0), None], r"parts: expected 1, as sizes, got 2"),
        (0, [(A[:, :9], B, 1.0)], r"a of part 0: expected \[R, 10\], got \(3, 9\)"),
        (0, [(A, B[:, :2], 1.0)], r"b of part 0: expected \(6, 3\), got \(6, 2\)"),
        (0, [(A[0], B, 1.0)], r"a of part 0: expected \[R, 10\], got \(10,\)"),
        (0, [(torch.ones(9, 10), torch.ones(6, 9), 1.0)], r"a rank <= 8, got 9"),
    ],
)
def test_what_does_not_fit_leaves_the_slot_as_it_was(slot, parts, message):
    pool = lora_slots([(A, B, 1.0)], slots=2)
    before = [t.clone() for t in pool[:4]]
    with pytest.raises(ValueError, match=message):
        pool.put(slot, parts)
    assert all(torch.equal(t, old) for t, old in zip(pool[:4], before, strict=True))


def test_slots_that_cannot_be_made_or_read():
    for adapters, message in (
        ([], "at least one"),
        ([None], "at least one"),
        ([[(A, B, 1.0), None]], "one that has part 1, got none"),
        ([(A, B, 1.0), [None, None]], r"as many parts in each, got \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_slots(adapters)
    with pytest.raises(ValueError, match="slots: expected >= 2.*got 1"):
        lora_slots([(A, B, 1.0), None], slots=1)
    pool = empty_lora_slots(10, (6,), 2, 8)
    with pytest.raises(ValueError, match="slot 1 holds no adapter"):
        pool.get(1)
    with pytest.raises(ValueError, match="slot: expected 0..1, got -1"):
        pool.get(-1)
