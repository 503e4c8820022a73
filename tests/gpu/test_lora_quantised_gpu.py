"""lora_linear over bases in 4 and 8 bits on a GPU, `impl="triton"`. pytest -m gpu tests/gpu"""

import pytest
import torch

from fusedpeft import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("exact_matmul"),
]

SHAPES = {  # M, N, K, R
    "one_row": (1, 1024, 2048, 16),
    "rows16": (16, 513, 770, 50),
    "odd": (63, 65, 130, 8),
    "square": (2048, 2048, 2048, 16),
    "high_rank": (300, 260, 520, 130),
    "slabs": (512, 4352, 4224, 16),  # two and a ragged one, in either direction
}
KINDS = {
    "nf4": lambda w: ops.NF4Weight.quantise(w),
    "nf4_double": lambda w: ops.NF4Weight.quantise(w, double=True),
    "nf4_blocks_of_256": lambda w: ops.NF4Weight.quantise(w, 256),
    "fp8_rows": lambda w: ops.FP8Weight.quantise(w),
    "fp8": lambda w: ops.FP8Weight.quantise(w, per_row=False),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(shape, kind, dtype):
    """(weight, [x, a, b, bias], dy) on the GPU."""
    m, n, k, r = shape
    g = torch.Generator("cuda").manual_seed(m + n + k + r)

    def normal(*size, by=1.0, dtype=dtype):
        return (torch.randn(size, generator=g, device="cuda") * by).to(dtype)

    weight = KINDS[kind](normal(n, k, by=k**-0.5, dtype=torch.float32))
    tensors = [normal(m, k), normal(r, k, by=k**-0.5), normal(n, r, by=r**-0.5), normal(n)]
    return weight, tensors, normal(m, n)


def run(op, weight, tensors, dy, p=0.0, **kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    x, a, b, bias = leaves
    seed = torch.tensor([-(2**61) + 5], device="cuda")
    y = op(x, weight, a, b, 1.5, bias, dropout_p=p, seed=seed, **kwargs)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, kind, dtype, p):
    """max|got - ref64| <= 2 max|low - ref64| + eps, with torch in the inputs' dtype as `low`."""
    weight, tensors, dy = make(SHAPES[name], kind, dtype)
    got = run(ops.lora_linear, weight, tensors, dy, p, impl="triton")
    low = run(ops.lora_linear_ref, weight, tensors, dy, p)
    truth = run(ops.lora_linear_ref, weight, [t.double() for t in tensors], dy.double(), p)
    for what, g, ref, lo in zip(("y", "dx", "da", "db", "dbias"), got, truth, low, strict=True):
        error = (g.double() - ref).abs().max()
        bar = 2 * (lo.double() - ref).abs().max() + torch.finfo(dtype).eps * ref.abs().max()
        assert error <= bar, f"{what}: error {error:.3g}, allowed {bar:.3g}"


@pytest.mark.parametrize("kind", ["nf4_double", "fp8_rows"])
def test_runs_are_bit_equal_and_compiled_is_eager(kind):
    case = make(SHAPES["square"], kind, torch.bfloat16)
    compiled = torch.compile(ops.lora_linear, fullgraph=True)
    one, two, three = (
        run(op, *case, impl="triton") for op in (ops.lora_linear, ops.lora_linear, compiled)
    )
    for a, b, c in zip(one, two, three, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("tokens", [16, 512])
@pytest.mark.parametrize("kind", ["nf4_double", "fp8_rows"])
def test_no_buffer_of_the_size_of_w(kind, tokens):
    """A slab of 16 MiB and little else, of 32 in 16 bits; at few tokens not even that."""
    allowed = (4096 * 4096 // 4, (16 << 20) + 3 * tokens * 4096 * 2 + (4 << 20))[tokens > 16]
    weight, (x, a, b, _), _ = make((tokens, 4096, 4096, 16), kind, torch.bfloat16)
    x.requires_grad_()

    def step():
        y = ops.lora_linear(x, weight, a, b, 1.0)
        return torch.autograd.grad(y, x, torch.ones_like(y))

    step()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    assert torch.cuda.max_memory_allocated() - before < allowed


def test_forward_in_a_cuda_graph():
    weight, (x, a, b, bias), _ = make((4, 1024, 512, 16), "nf4_double", torch.bfloat16)

    def call():
        return ops.lora_linear(x, weight, a, b, 1.5, bias)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = call()
    x.normal_()
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, call())
