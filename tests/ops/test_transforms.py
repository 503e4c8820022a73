"""torch.func and forward-mode AD: refused by name, not with tangents lost."""

import pytest
import torch
from torch.autograd import forward_ad

from fusedpeft import ops

X = torch.randn(3, 5, 8)
W, A, B = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
DOWN, UP = torch.randn(4, 8), torch.randn(8, 4)
K, P = torch.randn(2, 2, 5, 8), torch.randn(2, 3, 8)
IDS = torch.arange(15).view(3, 5) % 6

OPS = {
    "lora_linear": (lambda x: ops.lora_linear(x, W, A, B, 0.5), X),
    "lora_linear_multi": (
        lambda x: ops.lora_linear_multi(x, [W], [A], [B], [0.5], [None])[0],
        X,
    ),
    "bottleneck_adapter": (lambda x: ops.bottleneck_adapter(x, DOWN, None, UP, None), X),
    "prefix_attention": (lambda q: ops.prefix_attention(q, K, K, P, P), K),
    "soft_prompt_embedding": (lambda p: ops.soft_prompt_embedding(IDS, W, p), torch.randn(4, 8)),
    "linear_logprob": (lambda h: ops.linear_logprob(h, W, IDS), X),
}


def with_tangent(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "forward mode": with_tangent,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_a_transform_is_refused_by_name(name, transform):
    op, x = OPS[name]
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match=f"^{name}: "):
            TRANSFORMS[transform](op, x)
    assert op(x).isfinite().all()  # and plainly it works after that


def test_the_reference_takes_them():
    for transform in ("vmap", "jvp", "grad"):
        TRANSFORMS[transform](lambda x: ops.lora_linear_ref(x, W, A, B, 0.5), X)
