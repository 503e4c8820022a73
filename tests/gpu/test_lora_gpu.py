"""LoRA linear on a GPU, through `ops.lora_linear(impl="triton")`. pytest -m gpu tests/gpu"""

import copy

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import lora_choice
from fusedpeft.ops.dropout import keep_mask_ref
from fusedpeft.ops.native import native

lora_gemm = pytest.importorskip("fusedpeft.kernels.lora_gemm", reason="needs triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("exact_matmul"),
]

SHAPES = {  # M, N, K, R
    "one_row": (1, 1024, 2048, 16),
    "rows16_high_rank": (16, 513, 771, 50),
    "odd": (63, 65, 129, 8),
    "tail_row": (1000, 129, 150, 12),
    "few_columns": (4096, 1024, 2048, 16),
    "square": (2048, 2048, 2048, 64),
    "large_tiles": (8192, 4096, 1024, 16),
    "large_tiles_ragged": (4100, 4104, 520, 40),
    "rank_past_the_tile": (300, 260, 520, 130),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALE = 1.5


def make(shape, dtype, adapter_dtype=None):
    """x, w, a, b, bias, dy on the GPU; base and update of like size."""
    m, n, k, r = shape
    g = torch.Generator("cuda").manual_seed(m + n + k + r)
    adapter = adapter_dtype or dtype

    def normal(*size, by=1.0, dtype=dtype):
        return (torch.randn(size, generator=g, device="cuda") * by).to(dtype)

    leaves = dict(
        x=normal(m, k),
        w=normal(n, k, by=k**-0.5),
        a=normal(r, k, by=k**-0.5, dtype=adapter),
        b=normal(n, r, by=r**-0.5, dtype=adapter),
        bias=normal(n),
    )
    return leaves, normal(m, n)


def run(leaves, dy, p=0.0, seed=None, impl="triton"):
    """y and the gradients of x, w, a, b, bias."""
    t = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    args = (t["x"], t["w"], t["a"], t["b"], SCALE, t["bias"])
    y = ops.lora_linear(*args, dropout_p=p, seed=seed, impl=impl)
    return (y.detach(), *torch.autograd.grad(y, list(t.values()), dy))


def specification(leaves, dy, p, seed, dtype):
    """The same by plain matrix products in `dtype`."""
    x, w, a, b, bias, dy = (v.to(dtype) for v in (*leaves.values(), dy))
    keep = torch.ones((), dtype=dtype, device="cuda")
    if p > 0.0:
        keep = keep_mask_ref(*x.shape, p, seed).to(dtype) / (1.0 - p)
    dropped, ds = x * keep, SCALE * (dy @ b)
    s = dropped @ a.T
    y = x @ w.T + bias + SCALE * (s @ b.T)
    return y, dy @ w + keep * (ds @ a), dy.T @ x, ds.T @ dropped, SCALE * (dy.T @ s), dy.sum(0)


def check(got, leaves, dy, p=0.0, seed=None):
    """max|got - ref64| <= 2 max|low - ref64| + eps, with torch in the inputs' dtype as `low`."""
    dtype = leaves["x"].dtype
    truth = specification(leaves, dy, p, seed, torch.float64)
    low = specification(leaves, dy, p, seed, dtype)
    names = ("y", "dx", "dw", "da", "db", "dbias")
    for name, g, ref, lo in zip(names, got, truth, low, strict=True):
        error = (g.double() - ref).abs().max()
        bar = 2 * (lo.double() - ref).abs().max() + torch.finfo(dtype).eps * ref.abs().max()
        assert error <= bar, f"{name}: error {error:.3g}, allowed {bar:.3g}"


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype, p):
    leaves, dy = make(SHAPES[name], dtype)
    seed = torch.tensor([-(2**61) + 12345], device="cuda")
    check(run(leaves, dy, p, seed), leaves, dy, p, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_beside_16_bits(dtype):
    leaves, dy = make(SHAPES["odd"], dtype, torch.float32)
    got = run(leaves, dy)
    assert got[0].dtype == dtype and got[3].dtype == got[4].dtype == torch.float32
    check(got, leaves, dy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_of_zeros_shows_the_adapter(dtype):
    leaves, dy = make(SHAPES["odd"], dtype)
    leaves["w"].zero_()
    leaves["bias"].zero_()
    check(run(leaves, dy), leaves, dy)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_mask_is_the_specification(p):
    """x, A and B of ones and units: y shows each mask bit, dx shows it again."""
    m, k = 70, 192
    seed = torch.tensor([0x1234_5678_9ABC_DEF0], device="cuda")
    eye = torch.eye(k, device="cuda")
    x = torch.ones(m, k, device="cuda", requires_grad=True)
    y = ops.lora_linear(
        x, torch.zeros_like(eye), eye, eye, 1.0, dropout_p=p, seed=seed, impl="triton"
    )
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    keep = keep_mask_ref(m, k, p, seed)
    assert torch.equal(y.detach() != 0, keep)
    assert torch.equal(dx != 0, keep)


@pytest.fixture
def tma_launches(monkeypatch):
    """The launches of the TMA kernel, as they come."""
    if torch.version.hip or torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs a GPU with TMA")
    launches, launch = [], lora_gemm._lora_gemm_tma
    monkeypatch.setattr(lora_gemm, "_lora_gemm_tma", lambda *t: launches.append(t) or launch(*t))
    return launches


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8192, 4096, 4096, 16), (4100, 4104, 4040, 24)])
def test_tma_and_pointers(tma_launches, monkeypatch, shape, adapter_dtype):
    leaves, dy = make(shape, torch.bfloat16, adapter_dtype)
    check(run(leaves, dy), leaves, dy)
    assert len(tma_launches) == 2  # y and dx
    leaves["w"].zero_()  # nothing hides the update's errors
    leaves["bias"].zero_()
    check(run(leaves, dy), leaves, dy)
    monkeypatch.setattr(lora_gemm, "tma_ok", lambda *_: False)
    check(run(leaves, dy), leaves, dy)
    assert len(tma_launches) == 4


def test_tma_in_a_cuda_graph_and_on_rows_that_are_part_of_wider_ones(tma_launches):
    leaves, _ = make((4096, 4096, 1024, 16), torch.bfloat16)
    x, w, a, b, bias = leaves.values()
    x = torch.cat((x, x), 1)[:, :1024]
    args = (w, a, b, SCALE, bias)
    y = ops.lora_linear(x, *args, impl="triton")  # compiles
    assert len(tma_launches) == 1
    assert torch.equal(y, ops.lora_linear(x.contiguous(), *args, impl="triton"))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = ops.lora_linear(x, *args, impl="triton")
    x.mul_(2.0)
    graph.replay()
    assert torch.equal(y, ops.lora_linear(x, *args, impl="triton"))


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd", "few_columns", "large_tiles"])
def test_cublas_and_passes_that_accumulate(name, dtype, adapter_dtype):
    leaves, dy = make(SHAPES[name], dtype, adapter_dtype)
    check(run(leaves, dy, impl="aten"), leaves, dy)


@pytest.mark.parametrize("chosen", ["triton", "cublas"])
def test_the_choice_is_what_runs(chosen, monkeypatch):
    monkeypatch.setattr(lora_choice, "_cached", lambda *_, **__: (chosen, ""))
    leaves, dy = make(SHAPES["tail_row"], torch.bfloat16)
    forced = run(leaves, dy, impl={"triton": "triton", "cublas": "aten"}[chosen])
    for one, two in zip(run(leaves, dy, impl=None), forced, strict=True):
        assert torch.equal(one, two)


def test_offsets_past_31_bits():
    """2.2e9 elements of x and of y in bf16, 9 GB: first and last rows as computed alone."""
    m, n, k, r = 1_060_000, 2048, 2048, 16
    assert m * k > 2**31 and m * n > 2**31
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    leaves, _ = make((64, n, k, r), torch.bfloat16)
    head = leaves.pop("x")
    x = torch.zeros((m, k), dtype=torch.bfloat16, device="cuda")
    x[:32], x[-32:] = head[:32], head[32:]
    x.requires_grad_()
    w, a, b, bias = leaves.values()
    y = ops.lora_linear(x, w, a, b, SCALE, bias, impl="triton")
    alone = torch.cat((y[:32], y[-32:])).double()
    ref = ops.lora_linear_ref(head.double(), w.double(), a.double(), b.double(), SCALE)
    ref += bias.double()
    assert (alone - ref).abs().max() <= 2**-7 * ref.abs().max()
    dy = torch.zeros_like(y)
    dy[-32:] = 1.0
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = (w.double() + SCALE * (b.double() @ a.double())).sum(0)
    assert dx[:-32].count_nonzero() == 0
    assert (dx[-1].double() - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_strided_input():
    leaves, dy = make((130, 256, 384, 12), torch.bfloat16)
    wide = torch.stack((leaves["x"], leaves["x"]), -1)[..., 0]
    assert not wide.is_contiguous()
    args = (leaves["w"], leaves["a"], leaves["b"], SCALE, leaves["bias"])
    y = ops.lora_linear(wide, *args, impl="triton")
    assert torch.equal(y, ops.lora_linear(leaves["x"], *args, impl="triton"))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_runs_are_bit_equal(p):
    leaves, dy = make((4096, 1024, 1024, 16), torch.bfloat16)
    seed = torch.tensor([11], device="cuda")
    for one, two in zip(run(leaves, dy, p, seed), run(leaves, dy, p, seed), strict=True):
        assert torch.equal(one, two)


def test_second_backward_is_equal():
    leaves, dy = make(SHAPES["odd"], torch.bfloat16)
    t = [v.requires_grad_() for v in leaves.values()]
    y = ops.lora_linear(*t[:4], SCALE, t[4], impl="triton")
    first = torch.autograd.grad(y, t, dy, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(y, t, dy), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("m", [4, 512])
def test_forward_in_a_cuda_graph(m):
    leaves, _ = make((m, 1024, 512, 16), torch.bfloat16)
    x, w, a, b, bias = leaves.values()

    def call():
        return ops.lora_linear(x, w, a, b, SCALE, bias, impl="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = call()
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(y, call())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_torch_compile_fullgraph(p):
    leaves, dy = make((256, 384, 512, 8), torch.bfloat16)
    seed = torch.tensor([3], device="cuda")

    def step(x, w, a, b, bias):
        y = ops.lora_linear(x, w, a, b, SCALE, bias, dropout_p=p, seed=seed, impl="triton")
        return torch.nn.functional.silu(y)

    results = []
    for fn in (step, torch.compile(step, fullgraph=True)):
        t = copy.deepcopy([v.requires_grad_() for v in leaves.values()])
        y = fn(*t)
        results.append((y.detach(), *torch.autograd.grad(y, t, dy)))
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).abs().max() <= 2**-6 * eager.abs().max()


needs_cuda_half = pytest.mark.skipif(
    not hasattr(native, "multi_lora_cuda"),
    reason="needs the CUDA half of fusedpeft._C: build with FUSEDPEFT_CUDA=1",
)


def decode(leaves, **options):
    x, w, a, b, bias = leaves.values()
    with torch.no_grad():
        return ops.lora_linear(x, w, a, b, SCALE, bias, **options)


@needs_cuda_half
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, k, r", [(4096, 4096, 16), (1024, 2048, 64), (65, 136, 8), (33, 771, 8)]
)
@pytest.mark.parametrize("m", [1, 5, 16, 64])
def test_decode_in_cuda(check_accuracy, m, n, k, r, dtype, adapter_dtype):
    leaves, _ = make((m, n, k, r), dtype, adapter_dtype)
    for _ in range(2):
        x, w, a, b, bias = leaves.values()
        low = ops.lora_linear_ref(x, w, a, b, SCALE, bias)
        up = [t.double() for t in (x, w, a, b)]
        ref = ops.lora_linear_ref(*up, SCALE, bias.double())
        check_accuracy("y", decode(leaves, impl="cuda"), low, ref)
        leaves["w"].zero_()  # nothing hides the adapter's errors


@needs_cuda_half
def test_decode_takes_cuda_by_itself_and_triton_where_a_rank_does_not_fit():
    leaves, _ = make((16, 256, 512, 16), torch.bfloat16)
    assert torch.equal(decode(leaves), decode(leaves, impl="cuda"))
    leaves, _ = make((16, 256, 512, 12), torch.bfloat16)
    assert torch.equal(decode(leaves), decode(leaves, impl="triton"))
    with pytest.raises(ValueError, match="a multiple of 8 .* R 12"):
        decode(leaves, impl="cuda")
    wide = {
        name: t if name == "bias" else t.repeat(1, 2)[:, : t.shape[1]] for name, t in leaves.items()
    }
    assert torch.equal(decode(wide), decode(leaves))


@needs_cuda_half
def test_decode_in_a_cuda_graph_and_compiled():
    leaves, _ = make((4, 1024, 512, 16), torch.bfloat16)
    want = decode(leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode(leaves)
    for seed in range(3):
        x = leaves["x"]
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(y, decode(leaves)) and not torch.equal(y, want)
    compiled = torch.compile(lambda: decode(leaves), fullgraph=True)
    assert torch.equal(compiled(), y)


def test_a_cuda_graph_makes_dora_norm_in_every_replay():
    leaves, _ = make((64, 256, 128, 8), torch.bfloat16)
    x, w, a, b, _ = leaves.values()
    magnitude = torch.ones(256, device="cuda")

    def call():
        with torch.no_grad():
            return ops.lora_linear(x, w, a, b, SCALE, magnitude=magnitude)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles, and leaves a norm behind
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    b.mul_(3.0)
    graph.replay()
    assert torch.equal(y, call())
