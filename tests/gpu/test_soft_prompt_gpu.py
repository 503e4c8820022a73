"""soft_prompt_embedding on a GPU: exact copies, float64 gradients. pytest -m gpu tests/gpu"""

import pytest
import torch

from fusedpeft import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = {  # B, T, V, P, n, d
    "odd": (3, 7, 13, 5, 4, 33),
    "llama_1b": (16, 512, 32000, 20, 4, 2048),
    "wide": (4, 130, 1000, 100, 3, 8192),
}


def make(shape, dtype, prompt_dtype, by_id):
    b, t, v, p, n, d = shape
    g = torch.Generator("cuda").manual_seed(sum(shape))
    ids = torch.randint(0, v, (b, t), generator=g, device="cuda")
    table = torch.randn(v, d, generator=g, device="cuda").to(dtype)
    size = (n, p, d) if by_id else (p, d)
    prompt = torch.randn(size, generator=g, device="cuda").to(prompt_dtype)
    rows = torch.randint(0, n, (b,), generator=g, device="cuda") if by_id else None
    return ids, table, prompt, rows, torch.randn(b, p + t, d, generator=g, device="cuda").to(dtype)


def run(op, ids, table, prompt, rows, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (table, prompt)]
    y = op(ids, *leaves, rows)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


@pytest.mark.parametrize("by_id", [False, True], ids=["shared", "by_id"])
@pytest.mark.parametrize("fp32_prompt", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(check_accuracy, name, dtype, fp32_prompt, by_id):
    prompt_dtype = torch.float32 if fp32_prompt else dtype
    args = make(SHAPES[name], dtype, prompt_dtype, by_id)
    got, low = (run(f, *args) for f in (ops.soft_prompt_embedding, ops.soft_prompt_embedding_ref))
    ids, table, prompt, rows, dy = args
    wide = (ids, table.double(), prompt.double(), rows, dy.double())
    ref = run(ops.soft_prompt_embedding_ref, *wide)
    assert torch.equal(got[0], low[0])
    for label, *t in zip(("dtable", "dprompt"), got[1:], low[1:], ref[1:], strict=True):
        assert t[0].dtype == t[1].dtype
        check_accuracy(label, *t)


def test_two_runs_give_the_same_bits():
    ids, table, prompt, rows, dy = make(SHAPES["llama_1b"], torch.bfloat16, torch.float32, True)
    prompt.requires_grad_()
    y = ops.soft_prompt_embedding(ids, table, prompt, rows)
    first, second = (torch.autograd.grad(y, prompt, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_unknown_ids_are_nan_rows_and_raise_in_debug(monkeypatch):
    ids, table, prompt, rows, _ = make(SHAPES["odd"], torch.float32, torch.float32, True)
    clean = ops.soft_prompt_embedding(ids, table, prompt, rows)
    ids[1, 2], rows[0] = 13, -1
    got = ops.soft_prompt_embedding(ids, table, prompt, rows)
    bad = torch.zeros(clean.shape[:2], dtype=torch.bool, device="cuda")
    bad[0, :5] = bad[1, 5 + 2] = True
    assert got[bad].isnan().all() and torch.equal(got[~bad], clean[~bad])
    monkeypatch.setenv("FUSEDPEFT_DEBUG", "1")
    with pytest.raises(ValueError, match=r"input_ids: expected values in \[0, 13\), got 13"):
        ops.soft_prompt_embedding(ids, table, prompt, rows)


def test_compiles_and_captures():
    ids, table, prompt, rows, _ = make(SHAPES["llama_1b"], torch.bfloat16, torch.bfloat16, True)
    want = ops.soft_prompt_embedding(ids, table, prompt, rows)
    compiled = torch.compile(ops.soft_prompt_embedding, fullgraph=True)
    assert torch.equal(compiled(ids, table, prompt, rows), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.soft_prompt_embedding(ids, table, prompt, rows)
    rows.copy_(rows.flip(0))
    graph.replay()
    assert torch.equal(y, ops.soft_prompt_embedding_ref(ids, table, prompt, rows))
