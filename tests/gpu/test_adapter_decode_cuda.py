"""csrc/cuda/adapter_decode.cu on a GPU through its op, against float64. pytest -m gpu tests/gpu"""

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import Adapter, AdapterSlots, adapter_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not hasattr(native, "adapter_decode_cuda"),
        reason="needs the CUDA half of fusedpeft._C: build with FUSEDPEFT_CUDA=1",
    ),
    pytest.mark.usefixtures("exact_matmul"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (64, 5, 0, None, 24)  # of the slots; None: free


def adapter(d, e, dtype, g, own=None):
    def draw(*size, std=1.0):
        return (torch.randn(size, generator=g, device="cuda") * std).to(dtype)

    norm = (draw(d) + 1 if own else None, draw(d) if own == "layer_norm" else None)
    down, up = draw(e, d, std=d**-0.5), draw(d, e, std=max(e, 1) ** -0.5)
    return Adapter(down, draw(e), up, draw(d), 0.5 + e / 64, *norm)


def make(m, d, dtype, *, pool=None, norm=None, own=False, sizes=SIZES, seed=0):
    """(x, slots, slots of a batch, keywords); pool: its dtype, where it is not x's."""
    g = torch.Generator("cuda").manual_seed(m + 3 * d + seed)
    draw = lambda *size: torch.randn(size, generator=g, device="cuda") + 0.5  # noqa: E731
    held = [None if e is None else adapter(d, e, pool or dtype, g, own and norm) for e in sizes]
    slots = torch.randint(-1, len(sizes), (m,), generator=g, dtype=torch.int32, device="cuda")
    slots[slots == 3] = 0
    kw = dict(residual=draw(m, d).to(dtype), norm=norm)
    if norm and not own:
        kw["norm_weight"] = draw(d).to(pool or dtype)
        kw["norm_bias"] = draw(d).to(pool or dtype) if norm == "layer_norm" else None
    return draw(m, d).to(dtype), adapter_slots(held), slots, kw


def double(value):
    if isinstance(value, AdapterSlots):
        return AdapterSlots(*(double(t) for t in value))._replace(size=value.size)
    return value.double() if isinstance(value, torch.Tensor) else value


def compare(check, x, pool, slots, **kw):
    got = ops.multi_bottleneck_adapter(x, pool, slots, **kw)
    low = ops.multi_bottleneck_adapter_ref(x, pool, slots, **kw)
    kw64 = {k: double(v) for k, v in kw.items()}
    ref = ops.multi_bottleneck_adapter_ref(double(x), double(pool), slots, **kw64)
    assert got.dtype == x.dtype and got.is_contiguous()
    check("y", got, low, ref)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, d", [(1, 4096), (2, 64), (7, 1000), (16, 129), (33, 768), (64, 2048), (256, 40)]
)
def test_against_float64(check_accuracy, m, d, dtype):
    x, pool, slots, kw = make(m, d, dtype)
    for residual in (kw["residual"], x, None):
        kw["residual"] = residual
        compare(check_accuracy, x, pool, slots, activation="gelu", **kw)
    for slot in (0, 1, -1):  # all of one
        compare(check_accuracy, x, pool, torch.full_like(slots, slot), **kw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms(check_accuracy, norm, own, dtype):
    x, pool, slots, kw = make(11, 1024, dtype, norm=norm, own=own)
    compare(check_accuracy, x, pool, slots, activation="silu", **kw)
    compare(check_accuracy, x, pool, slots, norm_position="after", **kw)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu"])
def test_fp32_adapters_beside_16_bits(check_accuracy, activation, dtype):
    x, pool, slots, kw = make(13, 96, dtype, pool=torch.float32, norm="layer_norm")
    compare(check_accuracy, x, pool, slots, activation=activation, **kw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_adapters_and_rows_that_start_anywhere(check_accuracy, dtype):
    x, pool, slots, kw = make(9, 264, dtype, sizes=(300, 2048, 8, None, 1))
    compare(check_accuracy, x, pool, slots, **kw)
    wide = torch.randn(9, 531, device="cuda").to(dtype)
    for some in (wide[:, 3:267], wide[:, 1:529:2], wide[:1, :264].expand(9, 264)):
        compare(check_accuracy, some, pool, slots, **kw)


def test_what_is_too_large_goes_another_way_and_says_so():
    x, pool, slots, kw = make(300, 64, torch.float32)
    kw["residual"] = None
    got = ops.multi_bottleneck_adapter(x, pool, slots, **kw)
    assert torch.equal(got, ops.multi_bottleneck_adapter(x, pool, slots, impl="aten", **kw))
    with pytest.raises(ValueError, match="expected <= 256 rows"):
        ops.multi_bottleneck_adapter(x, pool, slots, impl="cuda", **kw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_there_is_nan_and_touches_no_one_else(dtype, monkeypatch):
    x, pool, _, kw = make(6, 512, dtype)
    good = torch.tensor([0, 1, 4, 0, -1, 2], dtype=torch.int32, device="cuda")
    want = ops.multi_bottleneck_adapter(x, pool, good, **kw)
    slots = good.clone()
    slots[1], slots[3], slots[5] = 3, 5, -2
    got = ops.multi_bottleneck_adapter(x, pool, slots, **kw)
    assert got[[1, 3, 5]].isnan().all()
    near = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else {}  # other units, other sums
    torch.testing.assert_close(got[[0, 2, 4]], want[[0, 2, 4]], **near)
    assert torch.equal(ops.multi_bottleneck_adapter(x, pool, good, **kw), want)
    monkeypatch.setenv("FUSEDPEFT_DEBUG", "1")
    with pytest.raises(ValueError, match="slots: expected -1"):
        ops.multi_bottleneck_adapter(x, pool, slots, **kw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_replays_with_other_slots_and_adapters(check_accuracy, dtype):
    x, pool, slots, kw = make(12, 2048, dtype, norm="layer_norm", own=True)
    ops.multi_bottleneck_adapter(x, pool, slots, **kw)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # of which this is the first call
        out = ops.multi_bottleneck_adapter(x, pool, slots, **kw)
    g = torch.Generator("cuda").manual_seed(5)
    kw64 = {k: double(v) for k, v in kw.items()}
    for e in (17, 64, 1):
        pool.put(4, adapter(2048, e, dtype, g, "layer_norm"))
        slots.copy_(torch.randint(-1, 3, (12,), generator=g, device="cuda"))
        slots[::3] = 4
        graph.replay()
        low = ops.multi_bottleneck_adapter_ref(x, pool, slots, **kw)
        ref = ops.multi_bottleneck_adapter_ref(double(x), double(pool), slots, **kw64)
        check_accuracy("y", out, low, ref)


def test_streams_and_graphs_do_not_meet():
    """Calls that overlap as much as they can; graphs that were captured on one stream as well."""
    x, pool, slots, kw = make(8, 4096, torch.bfloat16)
    batches = [torch.full_like(slots, s) for s in (0, 1, 4)] + [slots]
    want = [ops.multi_bottleneck_adapter(x, pool, b, **kw) for b in batches]
    graphs, outs = [], []
    for batch in batches:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outs.append([ops.multi_bottleneck_adapter(x, pool, batch, **kw) for _ in range(20)])
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    eager = [[] for _ in batches]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                graphs[i].replay()
                eager[i].append(ops.multi_bottleneck_adapter(x, pool, batches[i], **kw))
    torch.cuda.synchronize()
    for right, mine, theirs in zip(want, outs, eager, strict=True):
        assert all(torch.equal(right, y) for y in (*mine, *theirs))


def test_nothing_is_allocated_but_y_and_nobody_waits():
    x, pool, slots, kw = make(32, 4096, torch.bfloat16)
    ops.multi_bottleneck_adapter(x, pool, slots, **kw)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = ops.multi_bottleneck_adapter(x, pool, slots, **kw)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    assert torch.equal(y, ops.multi_bottleneck_adapter(x, pool, slots, **kw))
