"""Gradients of gradients: in fp64 those of the specification, or an error."""

import pytest
import torch

from fusedpeft import ops


def draw(*size, seed=0):
    g = torch.Generator().manual_seed(sum(size) + seed)
    return torch.randn(size, generator=g, dtype=torch.float64).requires_grad_()


def second(function, inputs):
    """Of the sum of the squares of the first gradients, which mixes all of them."""
    y = function(*inputs)
    ys = y if isinstance(y, tuple) else (y,)
    loss = sum(
        (t * torch.arange(1.0, t.numel() + 1).view(t.shape).sin()).square().sum() for t in ys
    )
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return first, torch.autograd.grad(sum(t.square().sum() for t in first), inputs)


def same(function, reference, inputs):
    for got, want in zip(second(function, inputs), second(reference, inputs), strict=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


LORA = [draw(5, 7), draw(6, 7), draw(3, 7), draw(6, 3)]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_linear(p, bias):
    seed = torch.tensor([3])
    more = [draw(6)] if bias else []

    def call(op, *t):
        return op(*t[:4], 0.7, *t[4:], dropout_p=p, seed=seed)

    same(
        lambda *t: call(ops.lora_linear, *t), lambda *t: call(ops.lora_linear_ref, *t), LORA + more
    )


def test_lora_linear_with_a_frozen_weight_and_one_tensor_twice():
    x, w, a, b = LORA
    same(
        lambda x, a, b: ops.lora_linear(x, w.detach(), a, b, 0.7),
        lambda x, a, b: ops.lora_linear_ref(x, w.detach(), a, b, 0.7),
        [x, a, b],
    )
    square = draw(4, 4)
    same(
        lambda t: ops.lora_linear(t, t, t, t, 0.7),
        lambda t: ops.lora_linear_ref(t, t, t, t, 0.7),
        [square],
    )


def test_a_penalty_on_the_gradient_of_x_with_a_frozen_adapter():
    x, *frozen = LORA
    frozen = [t.detach() for t in frozen]
    same(
        lambda x: ops.lora_linear(x, *frozen, 0.7).tanh(),
        lambda x: ops.lora_linear_ref(x, *frozen, 0.7).tanh(),
        [x],
    )
    w, a = frozen[:2]
    with pytest.raises(RuntimeError, match="expected A or W to be trained"):
        second(lambda x, b: ops.lora_linear(x, w, a, b, 0.7), [x, LORA[3]])


def test_lora_linear_multi():
    x, w, a, b = LORA
    inputs = [x, w, draw(4, 7), a, draw(2, 7), b, draw(4, 2)]

    def call(op, x, w1, w2, a1, a2, b1, b2):
        return tuple(op(x, [w1, w2], [a1, a2], [b1, b2], [0.7, 1.5]))

    same(
        lambda *t: call(ops.lora_linear_multi, *t),
        lambda *t: call(ops.lora_linear_multi_ref, *t),
        inputs,
    )


@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
def test_bottleneck_adapter(norm):
    x, weights = draw(5, 8), [draw(3, 8), draw(3), draw(8, 3), draw(8)]
    norms = {} if norm is None else {"norm_weight": 8}
    inputs = [x, *weights, *(draw(n, seed=9) for n in norms.values())]

    def call(op, x, d, c, u, e, *norm_weight):
        named = dict(zip(norms, norm_weight, strict=True))
        return op(x, d, c, u, e, activation="silu", scale=0.5, residual=x, norm=norm, **named)

    same(
        lambda *t: call(ops.bottleneck_adapter, *t),
        lambda *t: call(ops.bottleneck_adapter_ref, *t),
        inputs,
    )


@pytest.mark.parametrize("lse", [False, True])
def test_prefix_attention(lse):
    inputs = [draw(2, 4, 5, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8, seed=1), draw(2, 3, 8),
              draw(2, 3, 8, seed=1)]  # fmt: skip
    same(
        lambda *t: ops.prefix_attention(*t, return_lse=lse),
        lambda *t: ops.prefix_attention_ref(*t, return_lse=lse),
        inputs,
    )


def test_linear_logprob():
    h, w = draw(5, 8), draw(11, 8)
    labels = torch.tensor([1, 4, -100, 10, 0])
    same(
        lambda h, w: ops.linear_logprob(h, w, labels, softcap=5.0),
        lambda h, w: ops.linear_logprob_ref(h, w, labels, softcap=5.0),
        [h, w],
    )
    with pytest.raises(RuntimeError, match="expected a head that is trained"):
        second(lambda h: ops.linear_logprob(h, w.detach(), labels), [h])
