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


class Scaled(torch.nn.Module):
    """Its numbers are attributes, which a compiler of any shapes makes symbols of."""

    def __init__(self, op):
        super().__init__()
        self.op, self.scale, self.eps, self.cap, self.window = op, 0.5, 1e-5, 4.0, 3

    def forward(self, x):
        return self.op(self, x)


NUMBERS = {
    "lora_linear": lambda m, x: ops.lora_linear(x, W, A, B, m.scale),
    "bottleneck_adapter": lambda m, x: ops.bottleneck_adapter(
        x, DOWN, None, UP, None, scale=m.scale, norm="layer_norm", norm_eps=m.eps, residual=x
    ),
    "prefix_attention": lambda m, x: ops.prefix_attention(
        x[:, None], x[:, None], x[:, None], P[:1], P[:1], scale=m.scale, window=m.window
    ),
    "linear_logprob": lambda m, x: ops.linear_logprob(
        x, W, (x[..., 0] > 0).long(), softcap=m.cap, temperature=m.scale
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_one_graph_for_all_shapes(name):
    torch.compiler.reset()
    module = Scaled(NUMBERS[name])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, tokens in ((2, 5), (3, 7)):
        x = torch.randn(rows, tokens, 8, requires_grad=True)
        got, want = compiled(x), module(x)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
