"""What test_interpret.py runs in a process of its own, under Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/kernels/soft_prompt_interpret_checks.py
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from fusedpeft import ops
from fusedpeft.kernels.soft_prompt import soft_prompt_bwd, soft_prompt_fwd

SHAPES = {  # B, T, V, P, n, d
    "one": (1, 1, 1, 1, 1, 1),
    "odd": (3, 7, 13, 5, 4, 33),
    "two_blocks": (2, 3, 11, 4, 3, 2100),
    "no_prompt": (2, 5, 11, 0, 3, 8),
    "no_tokens": (2, 0, 11, 4, 3, 8),
    "no_rows": (0, 5, 11, 4, 3, 8),
}


def make(shape, dtype, prompt_dtype, by_id):
    b, t, v, p, n, d = shape
    g = torch.Generator().manual_seed(sum(shape))
    ids = torch.randint(0, v, (b, t), generator=g)
    table = torch.randn(v, d, generator=g).to(dtype)
    prompt = torch.randn(n if by_id else 1, p, d, generator=g).to(prompt_dtype)
    rows = torch.randint(0, n, (b,), generator=g) if by_id else None
    return ids, table, prompt, rows, torch.randn(b, p + t, d, generator=g).to(dtype)


def exact_dprompt(dy, rows, prompts, length):
    out = torch.zeros(prompts, length, dy.shape[2], dtype=torch.float64)
    rows = torch.zeros(dy.shape[0], dtype=torch.int64) if rows is None else rows
    return out.index_add_(0, rows, dy[:, :length].double())


@pytest.mark.parametrize("by_id", [False, True], ids=["shared", "by_id"])
@pytest.mark.parametrize(
    "dtype, prompt_dtype",
    [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype, prompt_dtype, by_id):
    ids, table, prompt, rows, dy = make(SHAPES[name], dtype, prompt_dtype, by_id)
    given = prompt if by_id else prompt[0]
    y = soft_prompt_fwd(ids, table, prompt, rows)
    assert torch.equal(y, ops.soft_prompt_embedding_ref(ids, table, given, rows))
    got = soft_prompt_bwd(dy, rows, *prompt.shape[:2], prompt_dtype)
    assert got.dtype == prompt_dtype and got.shape == prompt.shape
    want = exact_dprompt(dy, rows, *prompt.shape[:2])
    if want.numel():
        eps = torch.finfo(prompt_dtype).eps
        assert (got.double() - want).abs().max() <= 2 * eps * want.abs().max()


def test_any_strides_and_int32_ids():
    ids, table, prompt, rows, dy = make(SHAPES["odd"], torch.float32, torch.float32, True)
    turned = (ids.int().t().contiguous().t(), table.t().contiguous().t(), prompt.mT.contiguous().mT)
    assert torch.equal(
        soft_prompt_fwd(*turned, rows.int()), soft_prompt_fwd(ids, table, prompt, rows)
    )
    args = (rows, *prompt.shape[:2], torch.float32)
    assert torch.equal(soft_prompt_bwd(dy.mT.contiguous().mT, *args), soft_prompt_bwd(dy, *args))


def test_an_unknown_id_is_nan_in_its_row_alone():
    ids, table, prompt, rows, _ = make(SHAPES["odd"], torch.float32, torch.float32, True)
    clean = soft_prompt_fwd(ids, table, prompt, rows)
    ids[1, 2], ids[2, 0], rows[0] = 13, -1, 4
    got = soft_prompt_fwd(ids, table, prompt, rows)
    bad = torch.zeros(clean.shape[:2], dtype=torch.bool)
    bad[0, :5] = bad[1, 5 + 2] = bad[2, 5] = True
    assert got[bad].isnan().all() and torch.equal(got[~bad], clean[~bad])
