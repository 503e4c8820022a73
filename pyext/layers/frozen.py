"""The frozen modules of a model that carries adapters, faster on a CPU: its plain linears, and the
RMSNorms, gated FFNs, rotary positions and decoded tokens' attention between them.

Of these a module is known by what its class computes: the code of its forward is that of Llama's or
Gemma's, or, of an attention, calls a function whose code is that of Llama's `apply_rotary_pos_emb`.
Whatever is not that, or that the kernels do not take, goes to the class's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from types import CellType, FunctionType

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fusedpeft.layers.attention import sdpa
from fusedpeft.layers.linear import PLAIN_FORWARDS, Linear
from fusedpeft.ops.elementwise_cpu import gated, gated_mlp, rms_norm, rotary


def hasten(model: nn.Module) -> None:
    """The frozen modules become ours, in place: parameters, hooks and names stay as they are."""
    for module in model.modules():
        kind = type(module)
        made = Linear if kind is nn.Linear else faster(kind)
        if made is not None and "forward" not in module.__dict__:
            module.__class__ = made


def restore(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is Linear or is_faster(module):
            module.__class__ = type(module).__bases__[0]


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
    return _rotary_forward(kind)


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
    return _same_code(own, other)


def _same_code(own: FunctionType, other: FunctionType) -> bool:
    """Whatever their docstrings say."""
    codes = (own.__code__, other.__code__)
    one, two = ((c.co_code, c.co_names, c.co_argcount, c.co_flags) for c in codes)
    consts = [f.__code__.co_consts[1 if f.__doc__ else 0 :] for f in (own, other)]
    of_torch = own.__globals__.get("torch") is other.__globals__.get("torch")
    return one == two and consts[0] == consts[1] and of_torch


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
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        if all([type(m).forward in PLAIN_FORWARDS and unhooked(m) for m in linears]):
            y = gated_mlp(args[0], *((m.weight, m.bias) for m in linears), activation)
            if y is not None:
                return y
        gate, up = self.gate_proj(args[0]), self.up_proj(args[0])
        h = gated(gate, up, activation)
        return self.down_proj(self.act_fn(gate) * up if h is None else h)

    return forward


_ROTARY, _HALF, _ATTENTIONS = "apply_rotary_pos_emb", "rotate_half", "ALL_ATTENTION_FUNCTIONS"


class _Attentions(AttentionInterface):
    """transformers' attention functions, of which sdpa is ours."""

    def __getitem__(self, name: str) -> Callable:
        found = ALL_ATTENTION_FUNCTIONS[name]
        return sdpa if found is sdpa_attention_forward else found


def _rotary_forward(kind: type):
    """The class's own forward, with functions of ours where it looks for theirs."""
    given = getattr(kind, "forward", None)
    inner = inspect.unwrap(given) if isinstance(given, FunctionType) else None
    if not isinstance(inner, FunctionType) or _ROTARY not in inner.__code__.co_names:
        return None
    for name in (_ROTARY, _HALF):
        found = inner.__globals__.get(name)
        known = vars(_llama())[name]
        if not isinstance(found, FunctionType) or found.__defaults__ != known.__defaults__:
            return None
        if not _same_code(found, known):
            return None
    eager = inner.__globals__[_ROTARY]

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        made = None if args or kwargs else rotary(q, k, cos, sin)
        return eager(q, k, cos, sin, *args, **kwargs) if made is None else made

    replaced = {_ROTARY: apply}
    if inner.__globals__.get(_ATTENTIONS) is ALL_ATTENTION_FUNCTIONS:
        replaced[_ATTENTIONS] = _Attentions()
    ours = _with_globals(given, replaced)

    @wraps(given)
    def forward(self, *args, **kwargs):
        patched = inner.__globals__[_ROTARY] is not eager  # by other kernels, since then
        own = patched or torch.compiler.is_compiling()
        return (given if own else ours)(self, *args, **kwargs)

    return forward


def _with_globals(f: FunctionType, replaced: dict[str, object]) -> FunctionType:
    """A function as f is, but for some globals; of a decorated one, what is decorated."""
    inner, cells, globals_ = getattr(f, "__wrapped__", None), f.__closure__, f.__globals__
    if inner is None:
        globals_ = {**globals_, **replaced}
    else:
        made = _with_globals(inner, replaced)
        cells = tuple(CellType(made) if c.cell_contents is inner else c for c in cells)
    copied = FunctionType(f.__code__, globals_, f.__name__, f.__defaults__, cells)
    copied.__kwdefaults__ = f.__kwdefaults__
    return copied


def unhooked(module: nn.Module) -> bool:
    """True where calling the module is calling its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
