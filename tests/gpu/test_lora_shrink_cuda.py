"""csrc/cuda/lora_shrink.cu on a GPU, against float64. pytest -m gpu tests/gpu"""

import pytest
import torch

from fusedpeft.ops.native import DTYPE_CODES, native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not hasattr(native, "lora_shrink_cuda"),
        reason="needs the CUDA half of fusedpeft._C: build with FUSEDPEFT_CUDA=1",
    ),
]

SHAPES = {  # M, K, R, more columns in the rows of x and A
    "one_token": (1, 4096, 16, 0),
    "one_element": (1, 1, 1, 0),
    "unaligned": (3, 2049, 8, 0),
    "aligned_with_a_tail": (4, 2052, 12, 4),
    "odd": (7, 777, 5, 3),
    "many_tokens": (64, 4096, 64, 0),
    "past_64_tokens": (1000, 512, 9, 8),
    "empty_sum": (5, 0, 3, 8),
}
PAIRS = [(d, d) for d in DTYPE_CODES] + [(d, torch.float32) for d in DTYPE_CODES if d.itemsize == 2]


def shrink(x, a):
    """x Aᵀ in fp32 in a matrix with three columns of NaN more, which must stay."""
    m, r = x.shape[0], a.shape[0]
    wide = torch.full((m, r + 3), float("nan"), device="cuda")
    native.lora_shrink_cuda(
        x.data_ptr(), a.data_ptr(), wide.data_ptr(), m, x.shape[1], r,
        x.stride(0), a.stride(0), wide.stride(0), DTYPE_CODES[x.dtype], DTYPE_CODES[a.dtype],
        torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    assert wide[:, r:].isnan().all()
    return wide[:, :r]


def make(m, k, r, more, dtype, adapter_dtype):
    g = torch.Generator("cuda").manual_seed(m + k + r)
    x = torch.randn((m, k + more), generator=g, device="cuda").to(dtype)
    a = torch.randn((r, k + more), generator=g, device="cuda").to(adapter_dtype)
    return x[:, :k], a[:, :k]


def check(s, x, a):
    """Within 2^-23 of the sum of the magnitudes: fp32 products and sums, in a tree."""
    x, a = x.double(), a.double()
    error = (s.double() - x @ a.T).abs()
    assert (error <= 2**-23 * (x.abs() @ a.abs().T)).all(), f"worst error {error.max():.3g}"


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype, adapter_dtype):
    x, a = make(*SHAPES[name], dtype, adapter_dtype)
    check(shrink(x, a), x, a)


def test_runs_are_bit_equal():
    x, a = make(64, 4096, 16, 0, torch.bfloat16, torch.bfloat16)
    assert torch.equal(shrink(x, a), shrink(x, a))


def test_offsets_past_31_bits():
    """Rows 2^30 elements apart: the third starts past 2^31."""
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    memory = torch.zeros(2 * 2**30 + 512, dtype=torch.bfloat16, device="cuda")
    x = memory.as_strided((3, 512), (2**30, 1))
    _, a = make(3, 512, 8, 0, torch.bfloat16, torch.bfloat16)
    x.copy_(torch.randn(3, 512, device="cuda"))
    check(shrink(x, a), x, a)


def test_in_a_cuda_graph():
    x, a = make(4, 2048, 16, 0, torch.bfloat16, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wide = torch.full((4, 16), float("nan"), device="cuda")
        native.lora_shrink_cuda(
            x.data_ptr(), a.data_ptr(), wide.data_ptr(), 4, 2048, 16, 2048, 2048, 16, 1, 1,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        check(wide, x, a)
