"""soft_prompt_embedding on a CPU against float64: values, gradients, rejections, transforms."""

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.soft_prompt import choose_impl

SHAPES = {  # B, T, V, P, n, d
    "one": (1, 1, 1, 1, 1, 1),
    "odd": (3, 7, 13, 5, 4, 33),
    "wide": (8, 65, 1000, 20, 2, 300),
    "no_prompt": (2, 5, 11, 0, 3, 8),
    "no_tokens": (2, 0, 11, 4, 3, 8),
    "no_rows": (0, 5, 11, 4, 3, 8),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(shape, dtype, prompt_dtype=None, by_id=False):
    b, t, v, p, n, d = shape
    g = torch.Generator().manual_seed(sum(shape))
    ids = torch.randint(0, v, (b, t), generator=g)
    table = torch.randn(v, d, generator=g).to(dtype)
    prompt = torch.randn(*((n, p, d) if by_id else (p, d)), generator=g).to(prompt_dtype or dtype)
    rows = torch.randint(0, n, (b,), generator=g) if by_id else None
    return ids, table, prompt, rows, torch.randn(b, p + t, d, generator=g).to(dtype)


def run(op, ids, table, prompt, rows, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (table, prompt)]
    y = op(ids, *leaves, rows)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


@pytest.mark.parametrize("by_id", [False, True], ids=["shared", "by_id"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(check_accuracy, name, dtype, by_id):
    args = make(SHAPES[name], dtype, by_id=by_id)
    ids, table, prompt, rows, dy = args
    got, low = (run(op, *args) for op in (ops.soft_prompt_embedding, ops.soft_prompt_embedding_ref))
    ref = run(
        ops.soft_prompt_embedding_ref, ids, table.double(), prompt.double(), rows, dy.double()
    )
    assert torch.equal(got[0], low[0])  # copies: exact
    for label, g, lo, r in zip(("dtable", "dprompt"), got[1:], low[1:], ref[1:], strict=True):
        assert g.dtype == lo.dtype and g.shape == lo.shape
        if g.numel():
            check_accuracy(label, g, lo, r)


def test_fp32_prompt_beside_bf16_and_int32_ids(check_accuracy):
    args = make(SHAPES["wide"], torch.bfloat16, torch.float32, by_id=True)
    ids, table, prompt, rows, dy = args
    got = run(ops.soft_prompt_embedding, ids.int(), table, prompt, rows.int(), dy)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert torch.equal(got[0], ops.soft_prompt_embedding_ref(ids, table, prompt, rows))
    exact = torch.zeros(prompt.shape, dtype=torch.float64)
    exact.index_add_(0, rows, dy[:, : prompt.shape[1]].double())
    torch.testing.assert_close(got[2].double(), exact, rtol=1e-6, atol=1e-6)


def test_strides():
    ids, table, prompt, rows, dy = make(SHAPES["odd"], torch.float32, by_id=True)
    want = run(ops.soft_prompt_embedding, ids, table, prompt, rows, dy)
    turned = (ids.t().contiguous().t(), table.t().contiguous().t(), prompt.mT.contiguous().mT)
    got = run(ops.soft_prompt_embedding, *turned, rows, dy.mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_frozen_table_costs_nothing_and_bits_repeat():
    ids, table, prompt, rows, dy = make(SHAPES["wide"], torch.float32, by_id=True)
    prompt.requires_grad_()
    y = ops.soft_prompt_embedding(ids, table, prompt, rows)
    first, second = (torch.autograd.grad(y, prompt, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not ops.soft_prompt_embedding(ids, table, prompt.detach(), rows).requires_grad


@pytest.mark.parametrize("by_id", [False, True])
def test_opcheck_gradcheck_and_compile(by_id):
    ids, table, prompt, rows, dy = make(SHAPES["odd"], torch.float64, by_id=by_id)
    leaves = [t.requires_grad_() for t in (table, prompt)]
    assert torch.autograd.gradcheck(
        lambda *t: ops.soft_prompt_embedding(ids, *t, rows), leaves, fast_mode=True
    )
    table, prompt = (t.detach().float().requires_grad_() for t in leaves)
    prompts = prompt if by_id else prompt[None]
    torch.library.opcheck(
        torch.ops.fusedpeft.soft_prompt_embedding.default, (ids, table, prompts, rows)
    )
    compiled = torch.compile(ops.soft_prompt_embedding, fullgraph=True, backend="aot_eager")
    args = (ids, table, prompt, rows, dy.float())
    for got, want in zip(run(compiled, *args), run(ops.soft_prompt_embedding, *args), strict=True):
        assert torch.equal(got, want)


IDS, TABLE, PROMPT = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 4), torch.zeros(6, 4)
TWO = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "args, error, message",
    [
        (([1], TABLE, PROMPT), TypeError, "input_ids: expected a Tensor, got list"),
        ((IDS[0], TABLE, PROMPT), ValueError, r"input_ids: expected \[B, T\], got \(3,\)"),
        ((IDS, TABLE[0], PROMPT), ValueError, r"table: expected \[V, d\].* got \(4,\)"),
        ((IDS, TABLE[:0], PROMPT), ValueError, r"table: expected \[V, d\].* got \(0, 4\)"),
        ((IDS, TABLE, PROMPT[:, :3]), ValueError, r"prompt: expected \[P, d\] with d = 4.*"),
        ((IDS, TABLE, PROMPT, TWO), ValueError, r"prompt: expected \[n, P, d\] \(prompt_ids is"),
        ((IDS, TABLE, PROMPT[None]), ValueError, r"prompt: expected \[P, d\].*got \(1, 6, 4\)"),
        ((IDS, TABLE, PROMPT.half()), TypeError, "or a prompt in torch.float32.*float16"),
        ((IDS.float(), TABLE, PROMPT), TypeError, "input_ids: expected torch.int64 or torch.int32"),
        ((IDS, TABLE, PROMPT.to("meta")), ValueError, r"prompt: expected device cpu .*got meta"),
        ((IDS + 5, TABLE, PROMPT), ValueError, r"expected values in \[0, 5\), got 5 at"),
        ((IDS - 1, TABLE, PROMPT), ValueError, r"input_ids: .* \[0, 5\), got -1 at"),
        ((IDS, TABLE, PROMPT[None], TWO - 1), ValueError, r"prompt_ids: .* in \[0, 1\), got -1"),
        ((IDS, TABLE, PROMPT[None], TWO[:1]), ValueError, r"prompt_ids: expected \[B\] = \[2\]"),
    ],
)  # fmt: skip
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        ops.soft_prompt_embedding(*args)


def test_what_runs_where():
    assert choose_impl("cpu", torch.float32)[0] == "aten"
    assert choose_impl("cuda", torch.bfloat16)[0] == "triton"
    assert choose_impl("cuda", torch.float64)[0] == "aten"
