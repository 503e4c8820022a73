"""The LoRA GEMM of many adapters on a GPU, beyond decode's tokens. pytest -m gpu tests/gpu"""

import math

import pytest
import torch

from fusedpeft.ops.slots import LoRASlots, row_stride

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("exact_matmul"),
]

CASES = {  # M, K, sizes, slots, max_rank
    "one_row": (1, 2048, (1024,), 3, 64),
    "decode": (16, 771, (513,), 8, 16),
    "odd": (65, 129, (65, 33, 40), 5, 40),
    "qkv": (300, 1024, (1024, 256, 256), 8, 64),
    "five_parts": (130, 256, (64, 48, 32, 17, 96), 4, 8),
    "gate_up_many": (512, 1024, (1536, 1536), 64, 64),
    "large_tiles": (8192, 1024, (4096,), 16, 16),
    "large_tiles_high_rank": (8192, 512, (4096,), 40, 64),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def lora_fwd(*args):
    from fusedpeft.kernels.multi_lora import multi_lora_fwd

    return multi_lora_fwd(*args)


def fill(pool, k, seed):
    """Other adapters in every slot, of other ranks: the last slot free, some parts without."""
    g = torch.Generator().manual_seed(seed)
    count, parts = pool.rank.shape
    pool.a.fill_(math.nan)
    pool.b.fill_(math.nan)
    pool.rank.copy_(torch.randint(0, pool.max_rank + 1, (count, parts), generator=g))
    pool.rank[-1] = -1
    pool.scale.copy_(torch.rand((count, parts), generator=g) + 0.5)
    for slot in range(count - 1):
        for i, n in enumerate(pool.sizes):
            r = int(pool.rank[slot, i])
            if r > 0:
                a = torch.randn(r, k, generator=g) / k**0.5
                pool.a[slot, i * pool.max_rank :][:r] = a.to(pool.a)
                rows = torch.zeros(n, row_stride(r))
                rows[:, :r] = torch.randn(n, r, generator=g) / r**0.5
                at = pool.max_rank * sum(pool.sizes[:i])
                pool.b[slot, at:][: rows.numel()] = rows.flatten().to(pool.b)


def make(case, dtype, pool_dtype=None):
    m, k, sizes, count, max_rank = case
    g = torch.Generator("cuda").manual_seed(m + k)

    def normal(*size, by=1.0):
        return (torch.randn(size, generator=g, device="cuda") * by).to(dtype)

    like = dict(device="cuda", dtype=pool_dtype or dtype)
    pool = LoRASlots(
        torch.empty((count, len(sizes) * max_rank, k), **like),
        torch.empty((count, sum(sizes) * max_rank), **like),
        torch.empty((count, len(sizes)), device="cuda", dtype=torch.int32),
        torch.empty((count, len(sizes)), device="cuda"),
        sizes,
    )
    fill(pool, k, m)
    return normal(m, k), normal(sum(sizes), k, by=k**-0.5), pool, draw(m, count), normal(sum(sizes))


def draw(m, count, seed=0):
    """Any slot, free ones among them, some -1 and out of range."""
    g = torch.Generator().manual_seed(m + seed)
    slots = torch.randint(-1, count, (m,), generator=g)
    slots[m // 2 :: 97] = count
    return slots.int().cuda()


def specification(x, w, pool, slots, bias, dtype):
    y = x.to(dtype) @ w.to(dtype).T + bias.to(dtype)
    y[(slots < -1) | (slots >= len(pool.rank))] = math.nan
    for slot, of_parts in enumerate(pool.rank.tolist()):
        rows = (slots == slot).nonzero()[:, 0]
        for i, (r, n) in enumerate(zip(of_parts, pool.sizes, strict=True)):
            cols = slice(sum(pool.sizes[:i]), sum(pool.sizes[: i + 1]))
            if r < 0:
                y[rows, cols] = math.nan
                continue
            a = pool.a[slot, i * pool.max_rank :][:r].to(dtype)
            b = pool.b[slot, pool.max_rank * cols.start :][: n * row_stride(r)]
            b = b.view(n, row_stride(r))[:, :r].to(dtype)
            y[rows, cols] += pool.scale[slot, i].to(dtype) * ((x[rows].to(dtype) @ a.T) @ b.T)
    return y


def check(got, *t):
    truth, low = (specification(*t, d).double() for d in (torch.float64, t[0].dtype))
    assert torch.equal(got.isnan(), truth.isnan())
    got, truth, low = (v.double().nan_to_num(0.0) for v in (got, truth, low))
    error = (got - truth).abs().max()
    bar = 2 * (low - truth).abs().max() + torch.finfo(t[0].dtype).eps * truth.abs().max()
    assert error <= bar, f"error {error:.3g}, allowed {bar:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, dtype):
    t = make(CASES[name], dtype)
    check(lora_fwd(*t), *t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_beside_16_bits(dtype):
    t = make(CASES["qkv"], dtype, torch.float32)
    check(lora_fwd(*t), *t)


def test_runs_are_bit_equal_beside_an_adapter_that_is_not_finite():
    x, w, pool, slots, bias = make(CASES["gate_up_many"], torch.bfloat16)
    want = lora_fwd(x, w, pool, slots, bias).nan_to_num(7.0)
    assert torch.equal(lora_fwd(x, w, pool, slots, bias).nan_to_num(7.0), want)
    pool.b[1] = math.inf
    got = lora_fwd(x, w, pool, slots, bias)
    assert got[(slots == 1)].isnan().all()
    assert torch.equal(got[slots != 1].nan_to_num(7.0), want[slots != 1])


@pytest.mark.parametrize("name", ["decode", "qkv", "large_tiles"])
def test_a_cuda_graph_follows_slots_and_pool(name):
    """Rows move to other slots and slots are loaded anew between replays."""
    x, w, pool, slots, bias = t = make(CASES[name], torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        lora_fwd(*t)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_fwd(*t)
    for seed in range(1, 4):
        slots.copy_(draw(len(x), len(pool.rank), seed))
        fill(pool, x.shape[1], seed)
        graph.replay()
        check(y, *t)
