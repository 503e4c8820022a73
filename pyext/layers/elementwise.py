"""The RMSNorms and gated FFNs of a model that carries adapters, on a CPU in one pass each.

A module is known by what its class computes: the code of its forward is that of Llama's or Gemma's.
Whatever is not that, or that the kernels do not take, goes to the class's own forward.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType

from torch import nn

from fusedpeft.ops.elementwise_cpu import gated, rms_norm


class Faster:
    """Marks the classes made here; the base of each is the class that it stands for."""

    def __reduce_ex__(self, protocol):  # pickle finds no class that is made at run time
        return _instance, (type(self).__bases__[0],), self.__dict__


def _instance(kind: type) -> nn.Module:
    made = faster(kind) or kind
    return made.__new__(made)


@cache
def faster(kind: type) -> type | None:
    """A class with kind's name and our forward, or None where kind computes something else."""
    forward = _forward_of(kind)
    if forward is None:
        return None
    of = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind, Faster), of)


def is_faster(module: nn.Module) -> bool:
    kinds = type(module).__bases__
    return len(kinds) == 2 and kinds[1] is Faster


def _forward_of(kind: type):
    if not kind.__module__.startswith("transformers.models."):
        return None
    if _same(kind, _llama().LlamaRMSNorm, "forward"):
        return _norm_forward(kind, "variance_epsilon", 0.0)
    gemma = _gemma().GemmaRMSNorm
    if _same(kind, gemma, "forward") and _same(kind, gemma, "_norm"):
        return _norm_forward(kind, "eps", 1.0)
    if _same(kind, _llama().LlamaMLP, "forward"):
        return _gated_forward(kind)
    return None


def _llama():
    from transformers.models.llama import modeling_llama

    return modeling_llama


def _gemma():
    from transformers.models.gemma import modeling_gemma

    return modeling_gemma


def _same(kind: type, model: type, name: str) -> bool:
    """Whether two methods do the same: their code, the constants and the names in it. What they
    look up outside is torch alone."""
    own, other = getattr(kind, name, None), getattr(model, name)
    if not isinstance(own, FunctionType) or own.__closure__ or own.__defaults__:
        return False
    codes = (own.__code__, other.__code__)
    one, two = ((c.co_code, c.co_consts, c.co_names, c.co_argcount, c.co_flags) for c in codes)
    return one == two and own.__globals__.get("torch") is other.__globals__.get("torch")


def _norm_forward(kind: type, eps: str, offset: float):
    def forward(self, *args, **kwargs):
        if len(args) == 1 and not kwargs:
            y = rms_norm(args[0], self.weight, getattr(self, eps), offset)
            if y is not None:
                return y
        return kind.forward(self, *args, **kwargs)

    return forward


def _gates() -> dict[type, str]:
    from transformers.activations import ACT2FN

    names = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
    return {nn.SiLU: "silu", **{type(ACT2FN[theirs]): ours for theirs, ours in names.items()}}


def _gated_forward(kind: type):
    gates = _gates()

    def forward(self, *args, **kwargs):
        activation = gates.get(type(self.act_fn))
        if activation is None or len(args) != 1 or kwargs or not unhooked(self.act_fn):
            return kind.forward(self, *args, **kwargs)
        gate, up = self.gate_proj(args[0]), self.up_proj(args[0])
        h = gated(gate, up, activation)
        return self.down_proj(self.act_fn(gate) * up if h is None else h)

    return forward


def unhooked(module: nn.Module) -> bool:
    """True where calling the module is calling its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
