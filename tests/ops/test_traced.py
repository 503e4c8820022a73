"""torch.jit's tracer sees what goes through the dispatcher alone: no op goes past it."""

from __future__ import annotations

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.multi_lora_cpu import prepared
from fusedpeft.ops.slots import Adapter, PrefixSlots, adapter_slots, lora_slots

D, E, R = 32, 8, 8
IDS = torch.tensor([[1, 2, 3]])
SLOTS = torch.zeros(3, dtype=torch.int32)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


W, A, B = normal(D, D), normal(R, D, seed=1), normal(D, R, seed=2)
DOWN, UP = normal(E, D, seed=3), normal(D, E, seed=4)
POOL = lora_slots([(A, B, 0.5)])
ADAPTERS = adapter_slots([Adapter(DOWN, None, UP, None)])
NF4 = ops.NF4Weight.quantise(normal(D, 64))
HEADS = normal(2, 3, 16, seed=5)  # [H, P, D] of a prefix
PREFIXES = PrefixSlots(HEADS[None], HEADS[None], torch.tensor([3], dtype=torch.int32))
FEW = prepared(W, POOL, None)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, 2, 3, 16)


CALLS = {  # x [3, D] -> y
    "lora_linear": lambda x: ops.lora_linear(x, W, A, B, 1.0),
    "lora_linear, NF4": lambda x: ops.lora_linear(x.repeat(1, 2), NF4, A.repeat(1, 2), B, 1.0),
    "lora_linear_multi": lambda x: ops.lora_linear_multi(x, [W, W], [A, A], [B, B], [1.0, 0.5])[1],
    "multi_lora_linear": lambda x: ops.multi_lora_linear(x, W, POOL, SLOTS),
    "prepared": lambda x: x if (y := FEW(x, SLOTS)) is None else y,
    "bottleneck_adapter": lambda x: ops.bottleneck_adapter(x, DOWN, None, UP, None, residual=x),
    "multi_bottleneck_adapter": lambda x: ops.multi_bottleneck_adapter(
        x, ADAPTERS, SLOTS, residual=x
    ),
    "prefix_attention": lambda x: ops.prefix_attention(
        heads(x), heads(x), heads(x), HEADS, HEADS, causal=True
    ),
    "prefix_decode_attention": lambda x: ops.prefix_decode_attention(
        heads(x), heads(x), heads(x), PREFIXES, SLOTS[:1]
    ),
    "soft_prompt_embedding": lambda x: ops.soft_prompt_embedding(IDS, W, x),
    "linear_logprob": lambda x: ops.linear_logprob(x, W, IDS[0]),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_trace_holds_the_call_and_not_what_it_wrote(name):
    call, first, second = CALLS[name], normal(3, D, seed=6), normal(3, D, seed=7)
    with torch.no_grad():
        traced = torch.jit.trace(call, (first,), check_trace=False)
        if name == "prepared":
            assert torch.equal(traced(second), second)  # it hands the call on
        else:
            torch.testing.assert_close(traced(second), call(second))
