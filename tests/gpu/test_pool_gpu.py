"""AdapterPool on a GPU: copies on a stream of its own, CUDA graphs that outlive what slots hold.
pytest -m gpu tests/gpu"""

import pytest
import torch
from torch import nn

import fusedpeft as fp
from fusedpeft import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
K, N, ROWS = 512, 384, 8


@pytest.fixture
def parts(exact_matmul):
    """(pool of three slots over one linear, W, x, {name: tensors}, output of one alone)."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=False)).cuda().requires_grad_(False)
    pool = fp.AdapterPool.for_model(model, slots=3, max_rank=64)
    adapters = {
        name: {
            "0.lora_A": torch.randn(rank, K, generator=g) / K**0.5,
            "0.lora_B": torch.randn(N, rank, generator=g),
            "0.scale": 0.5,
        }
        for name, rank in zip("abcdef", (1, 8, 12, 16, 33, 64), strict=True)
    }
    x, w = torch.randn(ROWS, K, generator=g).cuda(), model[0].weight

    def alone(name):
        a, b, scale = adapters[name].values()
        wide = (t.double() for t in (x, w, a.cuda(), b.cuda()))
        return ops.lora_linear_ref(*wide, scale)

    return pool, w, x, adapters, alone


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_who_acquires_waits_for_the_copy_and_a_copy_for_who_released(parts):
    """Loads and uses chase each other through three slots while the GPU lags behind."""
    pool, w, x, adapters, alone = parts
    for name, tensors in adapters.items():
        pool.put(name, tensors)
    side, got = torch.cuda.Stream(), []
    torch.cuda.synchronize()
    for turn in range(4):
        for name in adapters:  # each gives another's slot up
            stream = side if turn % 2 else torch.cuda.current_stream()
            with torch.cuda.stream(stream), pool.hold([name] * ROWS) as slots:
                torch.cuda._sleep(1_000_000)
                got.append((name, ops.multi_lora_linear(x, w, pool.at("0"), slots)))
    torch.cuda.synchronize()
    for name, y in got:
        close(y, alone(name))


def test_a_graph_replays_after_slots_were_rewritten(parts):
    pool, w, x, adapters, alone = parts
    pool.put("a", adapters["a"])
    (held,) = pool.acquire(["a"])
    slots = torch.full((ROWS,), held, dtype=torch.int32, device="cuda")
    ops.multi_lora_linear(x, w, pool.at("0"), slots)  # what is built at first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.multi_lora_linear(x, w, pool.at("0"), slots)
    graph.replay()
    close(y, alone("a"))
    pool.put("a", adapters["f"])  # into another slot: the held one stays
    graph.replay()
    close(y, alone("a"))
    pool.release([held])
    (new,) = pool.acquire(["a"])
    slots.fill_(new)
    graph.replay()
    close(y, alone("f"))
    slots.fill_(held)  # a slot that holds nothing any more
    torch.cuda.synchronize()
    graph.replay()
    assert y.isnan().all()
    slots.fill_(-1)
    graph.replay()
    close(y, x.double() @ w.double().t())


def test_an_evicted_slot_is_zero(parts):
    pool, _, _, adapters, _ = parts
    pool.put("f", adapters["f"])
    with pool.hold(["f"]):
        pool.evict("f")
        torch.cuda.synchronize()
        assert pool._numbers.any()
    torch.cuda.synchronize()
    assert not pool._numbers.any() and (pool._sizes == -1).all()
    assert all(t.is_cuda for t in pool.at("0")[:4])
    packed = pool._places.pack("f", adapters["f"], pool.dtype, True)
    assert packed.flat.is_pinned() and packed.sizes.is_pinned()
