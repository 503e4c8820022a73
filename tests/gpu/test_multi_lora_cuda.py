"""csrc/cuda/multi_lora.cu on a GPU through its op, against float64. pytest -m gpu tests/gpu"""

import math
import time

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import lora_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not hasattr(native, "multi_lora_cuda"),
        reason="needs the CUDA half of fusedpeft._C: build with FUSEDPEFT_CUDA=1",
    ),
    pytest.mark.usefixtures("exact_matmul"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = (8, 1, 64, 12, 0, 33)  # slot 6 is free


def make(m, k, sizes=(1024,), dtype=torch.bfloat16, pool_dtype=None, seed=0):
    """(x, w, pool, slots, bias): ranks mixed part by part, slots of every kind but bad ones."""
    g = torch.Generator().manual_seed(seed + m + k)

    def draw(*size, by=1.0):
        return torch.randn(size, generator=g) * by

    adapters = [
        [
            (draw(r, k, by=k**-0.5), draw(n, r, by=max(r, 1) ** -0.5), 0.5 + slot)
            for n, r in zip(sizes, (RANKS[(slot + i) % 6] for i in range(len(sizes))), strict=True)
        ]
        for slot in range(6)
    ]
    pool = lora_slots([*adapters, None], dtype=pool_dtype or dtype, device="cuda")
    x, w, bias = (
        t.to("cuda", dtype) for t in (draw(m, k), draw(sum(sizes), k, by=k**-0.5), draw(sum(sizes)))
    )
    return x, w, pool, random_slots(m, seed), bias


def random_slots(m, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 6, (m,), generator=g, dtype=torch.int32).cuda()


def double(x, w, pool, slots, bias):
    pool = pool._replace(a=pool.a.double(), b=pool.b.double())
    return x.double(), w.double(), pool, slots, None if bias is None else bias.double()


def compare(check, args, got=None):
    got = ops.multi_lora_linear(*args, impl="cuda") if got is None else got
    low, ref = ops.multi_lora_linear_ref(*args), ops.multi_lora_linear_ref(*double(*args))
    assert got.dtype == low.dtype and got.shape == low.shape
    check("y", got, low, ref)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "k, sizes", [(4096, (1024,)), (264, (40, 9, 72)), (771, (513,)), (8, (1,)), (1, (3, 2))]
)
@pytest.mark.parametrize("m", [1, 8, 13, 32, 64])
def test_against_float64(check_accuracy, m, k, sizes, dtype):
    args = make(m, k, sizes, dtype)
    compare(check_accuracy, args)
    x, w, pool, slots, _ = args
    compare(
        check_accuracy, (x, torch.zeros_like(w), pool, slots, None)
    )  # nothing hides the adapters


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("m", [1, 8, 64])
def test_fp32_adapters_beside_16_bits(check_accuracy, m, dtype):
    compare(check_accuracy, make(m, 1024, (512, 128), dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart_and_not_in_whole_pieces(check_accuracy, dtype):
    x, w, pool, slots, bias = make(5, 520, (96,), dtype)
    wide_x, wide_w = torch.randn(5, 536).to(x), torch.randn(96, 528).to(w)
    compare(check_accuracy, (wide_x[:, 8:528], wide_w[:, 8:], pool, slots, bias))
    wide_x, wide_w = torch.randn(5, 523).to(x), torch.randn(96, 521).to(w)
    compare(check_accuracy, (wide_x[:, 3:], wide_w[:, 1:], pool, slots, bias))
    compare(check_accuracy, (wide_x[:, 3:].t().contiguous().t(), w, pool, slots, bias))


def test_a_long_input_of_llama(check_accuracy):
    compare(check_accuracy, make(8, 4096, (4096, 1024, 1024)))
    compare(check_accuracy, make(1, 14336, (4096,)))


def test_it_is_what_a_few_tokens_take():
    x, w, pool, slots, bias = make(8, 512)
    want = ops.multi_lora_linear(x, w, pool, slots, bias, impl="cuda")
    assert torch.equal(ops.multi_lora_linear(x, w, pool, slots, bias), want)
    three = ops.multi_lora_linear(x.view(2, 4, -1), w, pool, slots, bias)
    assert torch.equal(three.view(8, -1), want)


@pytest.mark.parametrize("m", [3, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_there_is_nan_and_touches_no_one_else(m, dtype):
    x, w, pool, slots, bias = make(m, 256, (100, 30), dtype)
    want = ops.multi_lora_linear(x, w, pool, slots, bias)
    assert torch.equal(ops.multi_lora_linear(x, w, pool, slots, bias), want)
    for bad in (6, 7, -2, 2**31 - 1):
        changed = slots.clone()
        changed[1] = bad
        got = ops.multi_lora_linear(x, w, pool, changed, bias)
        assert got[1].isnan().all()
        rest = torch.arange(m, device="cuda") != 1
        assert torch.equal(got[rest], want[rest])
    pool.b[2] = math.inf  # whose is not finite harms its own rows
    got = ops.multi_lora_linear(x, w, pool, slots, bias)
    assert torch.equal(got[slots != 2], want[slots != 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 8, 64])
def test_a_graph_replays_after_slots_and_adapters_were_swapped(check_accuracy, m, dtype):
    args = make(m, 1024, (512, 64), dtype)
    x, _, pool, slots, _ = args
    ops.multi_lora_linear(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = ops.multi_lora_linear(*args)
        again = ops.multi_lora_linear(*args)  # over the same flags
    for seed in range(1, 6):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        slots.copy_(random_slots(m, seed))
        pool.put(seed, make(1, 1024, (512, 64), dtype, seed=seed)[2].get(seed))
        graph.replay()
        compare(check_accuracy, args, first)
        assert torch.equal(first, again)


def test_two_streams_and_two_graphs_at_once():
    """Each has flags of its own, or they would let each other's blocks pass, or wait for ever."""
    calls = [make(8, 2048, (2048,), seed=i) for i in range(2)]
    want = [ops.multi_lora_linear(*c) for c in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    graphs, results = [], []
    for c in calls:  # both captured on the same stream
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append([ops.multi_lora_linear(*c) for _ in range(20)])
    torch.cuda.synchronize()
    for _ in range(10):
        eager = []
        for c, stream, graph in zip(calls, streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                eager.append([ops.multi_lora_linear(*c) for _ in range(20)])
                graph.replay()
        torch.cuda.synchronize()
        for w, e, g in zip(want, eager, results, strict=True):
            assert all(torch.equal(y, w) for y in [*e, *g])


def test_offsets_past_31_bits(check_accuracy):
    """Rows of W 2^29 elements apart: the fifth starts at 2^31."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x, w, pool, slots, bias = make(2, 512, (6,))
    memory = torch.empty(5 * 2**29 + 512, dtype=torch.bfloat16, device="cuda")
    apart = memory.as_strided((6, 512), (2**29, 1))
    apart.copy_(w)
    compare(check_accuracy, (x, apart, pool, slots, bias))


def test_strides_that_the_kernel_does_not_take_go_to_triton(check_accuracy):
    x, w, pool, slots, bias = make(4, 256, (64,))
    turned = w.t().contiguous().t()
    with pytest.raises(ValueError, match="impl='cuda': expected rows of w with unit stride"):
        ops.multi_lora_linear(x, turned, pool, slots, bias, impl="cuda")
    got = ops.multi_lora_linear(x, turned, pool, slots, bias)
    compare(check_accuracy, (x, w, pool, slots, bias), got)


def test_debugging_reads_the_slots(monkeypatch):
    x, w, pool, slots, bias = make(4, 256, (64,))
    monkeypatch.setenv("FUSEDPEFT_DEBUG", "1")
    with pytest.raises(ValueError, match="slots: slot 6 holds no adapter"):
        ops.multi_lora_linear(x, w, pool, torch.full_like(slots, 6), bias)


def test_a_call_costs_the_host_about_as_much_as_a_frozen_one():
    """The bar is 8 us; how fast a machine is, calls of F.linear say."""
    x, w, pool, slots, _ = make(4, 64, (64,))

    def host_us(call):
        taken = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(20):
                call()
            taken.append((time.perf_counter() - start) / 20e-6)
            torch.cuda.synchronize()
        return min(taken)

    with torch.inference_mode():
        ours = host_us(lambda: ops.multi_lora_linear(x, w, pool, slots))
        frozen = host_us(lambda: torch.nn.functional.linear(x, w))
    assert ours <= 2.5 * frozen, f"{ours:.1f} us, F.linear {frozen:.1f}"
