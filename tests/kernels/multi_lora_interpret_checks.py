"""What test_interpret.py runs under Triton's interpreter: see lora_interpret_checks.py.

TRITON_INTERPRET=1 pytest tests/kernels/multi_lora_interpret_checks.py
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from fusedpeft.kernels import lora_tables, multi_lora
from fusedpeft.kernels.lora_tables import ARCHS
from fusedpeft.ops.slots import LoRASlots, row_stride

CASES = {  # M, K, sizes, ranks of each slot by part (-1: free), max_rank
    "one_row": (1, 33, (17,), [(5,)], 8),
    "decode": (16, 96, (40, 24), [(8, 16), (64, 0), (1, 33)], 64),
    "one_slot": (70, 130, (65,), [(16,)], 16),
    "mixed": (150, 72, (80,), [(8,), (64,), (-1,), (0,), (3,), (40,)], 64),
    "stacked": (130, 67, (65, 33, 40), [(8, 40, 0), (24, 1, 16), (-1, -1, -1)], 40),
    "five_parts": (20, 33, (17, 16, 15, 14, 13), [(1, 2, 3, 4, 5), (0, 0, 7, 0, 8)], 8),
}


def make_pool(sizes, k, ranks, max_rank, dtype):
    """Slots full of NaN but for what the layout says is read."""
    count, parts = len(ranks), len(sizes)
    a = torch.full((count, parts * max_rank, k), math.nan)
    b = torch.full((count, sum(sizes) * max_rank), math.nan)
    g = torch.Generator().manual_seed(count + k)
    for slot, of_parts in enumerate(ranks):
        for i, (n, r) in enumerate(zip(sizes, of_parts, strict=True)):
            if r > 0:
                a[slot, i * max_rank :][:r] = torch.randn(r, k, generator=g) / k**0.5
                rows = torch.zeros(n, row_stride(r))
                rows[:, :r] = torch.randn(n, r, generator=g) / r**0.5
                b[slot, max_rank * sum(sizes[:i]) :][: rows.numel()] = rows.flatten()
    scale = torch.rand((count, parts), generator=g) + 0.5
    ranks = torch.tensor(ranks, dtype=torch.int32)
    return LoRASlots(a.to(dtype), b.to(dtype), ranks, scale, sizes)


def make(case, dtype, pool_dtype=None):
    """x, w, pool, slots, bias; slots in any order, some -1, free and out of range among them."""
    m, k, sizes, ranks, max_rank = case
    g = torch.Generator().manual_seed(m + k)

    def normal(*size, by=1.0):
        return (torch.randn(size, generator=g) * by).to(dtype)

    pool = make_pool(sizes, k, ranks, max_rank, pool_dtype or dtype)
    slots = torch.randint(-1, len(ranks), (m,), generator=g, dtype=torch.int32)
    if m > 16:
        slots[3], slots[m // 2] = len(ranks), -2
    return normal(m, k), normal(sum(sizes), k, by=k**-0.5), pool, slots, normal(sum(sizes))


def specification(x, w, pool, slots, bias, dtype):
    """Row by row in `dtype`; NaN for rows without an adapter's slot."""
    y = x.to(dtype) @ w.to(dtype).T + (0 if bias is None else bias.to(dtype))
    for m, slot in enumerate(slots.tolist()):
        for i, n in enumerate(pool.sizes if slot != -1 else ()):
            start = sum(pool.sizes[:i])
            r = int(pool.rank[slot, i]) if 0 <= slot < len(pool.rank) else -1
            if r < 0:
                y[m, start : start + n] = math.nan
                continue
            a = pool.a[slot, i * pool.max_rank :][:r].to(dtype)
            rows = pool.b[slot, pool.max_rank * start :][: n * row_stride(r)]
            b = rows.view(n, row_stride(r))[:, :r].to(dtype)
            y[m, start : start + n] += pool.scale[slot, i].to(dtype) * (
                (x[m].to(dtype) @ a.T) @ b.T
            )
    return y


def check(got, *t):
    """NaN where the specification is, else max|got - ref64| <= 2 max|low - ref64| + eps."""
    truth, low = (specification(*t, d) for d in (torch.float64, t[0].dtype))
    assert torch.equal(got.isnan(), truth.isnan())
    got, truth, low = (v.double().nan_to_num(0.0) for v in (got, truth, low))
    error = (got - truth).abs().max()
    bar = 2 * (low - truth).abs().max() + 2 * torch.finfo(t[0].dtype).eps * truth.abs().max()
    assert error <= bar, f"error {error:.3g}, allowed {bar:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, dtype):
    t = make(CASES[name], dtype)
    check(multi_lora.multi_lora_fwd(*t), *t)
    check(multi_lora.multi_lora_fwd(*t[:4]), *t[:4], None)


@pytest.mark.parametrize("few_sms", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_table(arch, few_sms, monkeypatch):
    """The interpreter takes sm_80's tiles; the others, and the large ones, must be as right."""
    monkeypatch.setattr(multi_lora, "arch_of", lambda device: arch)
    if few_sms:
        monkeypatch.setitem(lora_tables.SMS, arch, 1)  # multi_lora_tables has the same
    for max_rank in (16, 40):
        t = make((139, 75, (263, 70), [(16, 3), (7, 16), (0, 1)], max_rank), torch.float16)
        check(multi_lora.multi_lora_fwd(*t), *t)


def test_base_of_zeros_shows_the_adapters():
    x, w, pool, slots, _ = make(CASES["stacked"], torch.float32)
    t = (x, torch.zeros_like(w), pool, slots, None)
    check(multi_lora.multi_lora_fwd(*t), *t)


@pytest.mark.parametrize("slot", [-1, 1, 2])
def test_all_rows_in_one_slot(slot):
    """No adapter at all, one, or one that is free."""
    x, w, pool, slots, bias = make(CASES["stacked"], torch.float32)
    t = (x, w, pool, torch.full_like(slots, slot), bias)
    check(multi_lora.multi_lora_fwd(*t), *t)


def test_fp32_adapters_beside_fp16():
    t = make(CASES["mixed"], torch.float16, torch.float32)
    got = multi_lora.multi_lora_fwd(*t)
    assert got.dtype == torch.float16
    check(got, *t)


def test_any_strides():
    x, w, pool, slots, bias = make(CASES["mixed"], torch.float32)
    want = multi_lora.multi_lora_fwd(x, w, pool, slots, bias)
    wide = [torch.stack((t, t), -1)[..., 0] for t in (x, w, slots, bias)]
    got = multi_lora.multi_lora_fwd(wide[0], wide[1].t().contiguous().t(), pool, *wide[2:])
    assert not wide[0].is_contiguous() and not wide[2].is_contiguous()
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_an_adapter_that_is_not_finite_harms_its_own_rows_only():
    x, w, pool, slots, bias = make(CASES["mixed"], torch.float16)
    want = multi_lora.multi_lora_fwd(x, w, pool, slots, bias)
    pool.b[1] = math.inf
    pool.a[4, :3] = math.nan
    got = multi_lora.multi_lora_fwd(x, w, pool, slots, bias)
    bad = (slots == 1) | (slots == 4)
    assert bad.any() and got[bad].isnan().all()
    assert torch.equal(got[~bad].nan_to_num(7.0), want[~bad].nan_to_num(7.0))


@pytest.mark.parametrize("m, n", [(0, 5), (3, 0)])
def test_nothing_to_do(m, n):
    pool = make_pool((n,), 7, [(3,)], 8, torch.float32)
    slots = torch.zeros(m, dtype=torch.int32)
    assert multi_lora.multi_lora_fwd(torch.ones(m, 7), torch.ones(n, 7), pool, slots).shape == (
        m,
        n,
    )


@pytest.mark.parametrize("m", [1, 64, 1500, 3000])
def test_the_plan_sorts_rows_and_cuts_tiles(m):
    """Stable, every row once; each tile of one slot, every row of a slot in one tile."""
    count, rows = 6, 16
    slots = torch.randint(-3, count + 2, (m,), generator=torch.Generator().manual_seed(m))
    slots = slots.to(torch.int32)
    order = torch.full((m,), -7, dtype=torch.int32)
    tiles = torch.full((m // rows + count + 2, 3), -7, dtype=torch.int32)
    multi_lora._multi_lora_plan_kernel[(count + 2,)](
        slots, order, tiles, m, count, ROWS=rows, CHUNK=1024
    )
    group = torch.where((slots < -1) | (slots >= count), count, slots)
    assert torch.equal(order.long(), torch.argsort(group, stable=True))
    seen = []
    for slot, first, stop in tiles.tolist():
        assert slot >= -1
        if slot >= 0:
            assert 0 < stop - first <= rows
            seen += [(slot, int(row)) for row in order[first:stop]]
    assert seen == [(int(group[i]), int(i)) for i in order if 0 <= group[i] < count]
