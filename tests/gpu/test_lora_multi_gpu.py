"""lora_linear_multi on a GPU, through `ops.lora_linear_multi(impl="triton")`. pytest -m gpu"""

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.dropout import keep_mask_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("exact_matmul"),
]

SHAPES = {  # M, K, [(N, R)]; R = 0: no adapter
    "one_row": (1, 2048, [(1024, 16), (256, 16)]),
    "odd": (63, 129, [(65, 8), (33, 16), (77, 50)]),
    "qkv": (2048, 2048, [(2048, 16), (512, 16), (512, 16)]),
    "gate_up_large_tiles": (8192, 1024, [(4096, 16), (4096, 16)]),
    "no_adapter_first": (300, 520, [(260, 0), (264, 64)]),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALES = (1.5, 0.5, 1.0)


def make(shape, dtype):
    """([x, *ws, *as, *bs, *biases], [dy]) on the GPU; base and update of like size."""
    m, k, parts = shape
    g = torch.Generator("cuda").manual_seed(m + k)

    def normal(*size, by=1.0):
        return (torch.randn(size, generator=g, device="cuda") * by).to(dtype)

    flat = [normal(m, k), *(normal(n, k, by=k**-0.5) for n, _ in parts)]
    flat += [normal(r, k, by=k**-0.5) if r else None for _, r in parts]
    flat += [normal(n, r, by=r**-0.5) if r else None for n, r in parts]
    return flat + [normal(n) for n, _ in parts], [normal(m, n) for n, _ in parts]


def run(flat, dys, p=0.0, seed=None, op=ops.lora_linear_multi):
    """The outputs, then the gradients of all that is there."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in flat]
    n = len(dys)
    ws, as_, bs, biases = (leaves[1 + i * n : 1 + (i + 1) * n] for i in range(4))
    args = (leaves[0], ws, as_, bs, SCALES[:n], biases)
    ys = op(*args, dropout_p=p, seed=seed, impl="triton")
    grads = torch.autograd.grad(ys, [t for t in leaves if t is not None], dys)
    return [*(y.detach() for y in ys), *grads]


def specification(flat, dys, p, seed, dtype):
    """The same by plain matrix products in `dtype`."""
    flat = [None if t is None else t.to(dtype) for t in flat]
    dys, n = [dy.to(dtype) for dy in dys], len(dys)
    x, parts = flat[0], zip(*(flat[1 + i * n : 1 + (i + 1) * n] for i in range(4)), strict=True)
    keep = torch.ones((), dtype=dtype, device="cuda")
    if p > 0.0:
        keep = keep_mask_ref(*x.shape, p, seed).to(dtype) / (1.0 - p)
    dropped, dx = x * keep, torch.zeros_like(x)
    ys, dws, das, dbs, dbiases = ([] for _ in range(5))
    for i, (w, a, b, bias) in enumerate(parts):
        dy, y = dys[i], x @ w.T + bias
        dx = dx + dy @ w
        dws.append(dy.T @ x)
        dbiases.append(dy.sum(0))
        if a is not None:
            s, ds = dropped @ a.T, SCALES[i] * (dy @ b)
            y, dx = y + SCALES[i] * (s @ b.T), dx + keep * (ds @ a)
            das.append(ds.T @ dropped)
            dbs.append(SCALES[i] * (dy.T @ s))
        ys.append(y)
    return [*ys, dx, *dws, *das, *dbs, *dbiases]


def check(got, flat, dys, p=0.0, seed=None):
    """max|got - ref64| <= 2 max|low - ref64| + eps, with torch in the inputs' dtype as `low`."""
    dtype = flat[0].dtype
    truth, low = (specification(flat, dys, p, seed, d) for d in (torch.float64, dtype))
    for i, (g, ref, lo) in enumerate(zip(got, truth, low, strict=True)):
        error = (g.double() - ref).abs().max()
        bar = 2 * (lo.double() - ref).abs().max() + torch.finfo(dtype).eps * ref.abs().max()
        assert error <= bar, f"output {i}: error {error:.3g}, allowed {bar:.3g}"


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype, p):
    flat, dys = make(SHAPES[name], dtype)
    seed = torch.tensor([-(2**61) + 12345], device="cuda")
    check(run(flat, dys, p, seed), flat, dys, p, seed)


def test_runs_are_bit_equal():
    flat, dys = make(SHAPES["qkv"], torch.bfloat16)
    seed = torch.tensor([11], device="cuda")
    for one, two in zip(run(flat, dys, 0.1, seed), run(flat, dys, 0.1, seed), strict=True):
        assert torch.equal(one, two)


def test_torch_compile_fullgraph():
    flat, dys = make(SHAPES["qkv"], torch.bfloat16)
    compiled = torch.compile(ops.lora_linear_multi, fullgraph=True)
    for one, two in zip(run(flat, dys), run(flat, dys, op=compiled), strict=True):
        assert torch.equal(one, two)


def test_forward_in_a_cuda_graph():
    flat, dys = make(SHAPES["qkv"], torch.bfloat16)
    n = len(dys)
    ws, as_, bs, biases = (flat[1 + i * n : 1 + (i + 1) * n] for i in range(4))

    def call():
        return ops.lora_linear_multi(flat[0], ws, as_, bs, SCALES, biases)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        ys = call()
    flat[0].normal_()
    graph.replay()
    for y, want in zip(ys, call(), strict=True):
        assert torch.equal(y, want)
