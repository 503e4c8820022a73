"""The LoRA layer: a frozen linear and its adapters, one fused call a forward."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedpeft.errors import InputError
from fusedpeft.layers.routing import Route, check_rows
from fusedpeft.ops import lora_linear, lora_linear_multi


def wide(t: Tensor) -> Tensor:
    """At least fp32: what norms and merged weights are computed in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class LoraAdapter(nn.Module):
    """The parameters of one adapter in one linear; the arithmetic is LoraLinear's.

    lora_A [R, K], lora_B [N, R], lora_magnitude_vector [N] (DoRA) or None.
    """

    def __init__(self, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float, p: float):
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.lora_magnitude_vector = None if magnitude is None else nn.Parameter(magnitude)
        self.scale, self.dropout = scale, p

    def extra_repr(self) -> str:
        kind = "" if self.lora_magnitude_vector is None else ", dora"
        (rank, k), n = self.lora_A.shape, self.lora_B.shape[0]
        return f"{k} -> {rank} -> {n}, scale={self.scale:g}, dropout={self.dropout:g}{kind}"

    def delta(self) -> Tensor:
        """scale · B A, [N, K], in fp32 at least."""
        return self.scale * (wide(self.lora_B) @ wide(self.lora_A))


class Siblings:
    """Linears of one module that read the same x (q, k and v; gate and up), in training: the first
    that is called computes for all, in one node of autograd, and the others take their part where
    they are handed the very same x, unwritten since. Who is not computes alone.
    """

    MISSES = 3  # passes in a row that left a part behind: this model hands them different ones

    def __init__(self, linears: tuple[LoraLinear, ...]):
        self.linears = linears
        self._forget()
        self.misses = 0

    def _forget(self) -> None:
        self._x, self._version, self._parts = None, 0, {}

    def __getstate__(self) -> dict:  # a copy of the model begins between two passes
        return {"linears": self.linears, "misses": 0, "_x": None, "_version": 0, "_parts": {}}

    def take(self, linear: LoraLinear, x: Tensor) -> Tensor | None:
        """`linear`'s y, or None: to be computed alone."""
        p = self.linears[0]._active[0].dropout
        # In training also without gradients: reentrant checkpointing is to draw the same mask.
        if not (torch.is_grad_enabled() or (p > 0.0 and linear.training)):
            return None
        if self._x is x and self._version == x._version and id(linear) in self._parts:
            y = self._parts.pop(id(linear))
            if not self._parts:
                self._forget()
                self.misses = 0
            return y
        if self._parts:
            self._forget()
            self.misses += 1
        if self.misses >= self.MISSES or not self._alike(x):
            return None
        adapters = [one._active[0] for one in self.linears]
        ys = lora_linear_multi(
            x,
            [one.weight_nk() for one in self.linears],
            [a.lora_A for a in adapters],
            [a.lora_B for a in adapters],
            [a.scale for a in adapters],
            [one.base_layer.bias for one in self.linears],
            dropout_p=p if linear.training else 0.0,
            magnitudes=[a.lora_magnitude_vector for a in adapters],
        )
        self._parts = {id(one): y for one, y in zip(self.linears, ys, strict=True)}
        self._x, self._version = x, x._version
        return self._parts.pop(id(linear))

    def _alike(self, x: Tensor) -> bool:
        """No sibling is offloaded, sharded by itself, routed or in another mode."""
        first = self.linears[0]
        return all(
            type(one.base_layer.weight) is nn.Parameter
            and type(one._active[0].lora_A) is nn.Parameter
            and one.base_layer.weight.device == x.device
            and one._route is None
            and one.training == first.training
            for one in self.linears
        )


class LoraLinear(nn.Module):
    """Stands where a linear stood: holds it as `base_layer`, and the adapters by name.

    x [*, K] -> [*, N]. `transposed` is GPT-2's Conv1D, whose weight is [K, N]: a view serves.
    The fused call reads the base's weight and bias and does not call the base, so hooks belong on
    this module. The base's parameters are this module's own, by the names they had without it:
    `save_pretrained` writes what `from_pretrained` reads, and `tie_weights` finds them.
    """

    def __init__(self, base_layer: nn.Module, transposed: bool):
        super().__init__()
        object.__setattr__(self, "base_layer", base_layer)  # no child: its dict is shared instead
        self._parameters = base_layer._parameters
        self.adapters = nn.ModuleDict()
        self.transposed = transposed
        shape = base_layer.weight.shape
        self.in_features, self.out_features = shape if transposed else shape[::-1]
        # All that forward reads, built beforehand. Empty: the base alone (none active, or merged).
        self._active: tuple[LoraAdapter, ...] = ()
        self._route: Route | None = None  # within `rows`: an adapter a row
        self._siblings: Siblings | None = None
        self.training = base_layer.training

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        shape = None if param is None else tuple(param.shape)
        for adapter in self.adapters.values() if shape else ():
            n = len(adapter.lora_B)
            if shape[-1 if self.transposed else 0] != n:
                raise InputError(
                    f"LoRA: expected a {name} of {n} outputs, got {shape}: detach the adapters, "
                    "change the model's size, then attach"
                )
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"

    def weight_nk(self) -> Tensor:
        """The base weight as [N, K], a view."""
        weight = self.base_layer.weight
        return weight.t() if self.transposed else weight

    def add(self, name: str, rank: int, scale: float, dropout: float, dora: bool) -> None:
        """A new adapter that changes nothing yet: A uniform in ±1/√K (as nn.Linear), B zero."""
        weight = self.weight_nk()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a = torch.empty(rank, self.in_features, dtype=dtype, device=weight.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = torch.zeros(self.out_features, rank, dtype=dtype, device=weight.device)
        # The op's formula for the norm at B = 0, so that a fresh DoRA adapter multiplies by 1.0.
        m = weight.detach().to(dtype).square().sum(1).sqrt() if dora else None
        self.adapters[name] = LoraAdapter(a, b, m, scale, dropout)
        self.adapters.train(self.training)

    def activate(self, names: Iterable[str], train: bool = True) -> None:
        """Those of `names` that live here, in that order; they alone are trainable."""
        self._active = tuple(self.adapters[n] for n in names if n in self.adapters)
        for adapter in self.adapters.values():
            adapter.requires_grad_(train and adapter in self._active)

    def forward(self, x: Tensor) -> Tensor:
        active, base = self._active, self.base_layer
        if self._route is not None:
            return self._by_row(x, self._route)
        if not active:
            return base(x)
        siblings = self._siblings
        if siblings is not None and not torch.compiler.is_compiling():
            y = siblings.take(self, x)
            if y is not None:
                return y
        y = self._fused(x, active[0])
        for adapter in active[1:]:
            y = (y + self._update(x, adapter)).to(y.dtype)
        return y

    def _fused(self, x: Tensor, adapter: LoraAdapter) -> Tensor:
        return lora_linear(
            x,
            self.weight_nk(),
            adapter.lora_A,
            adapter.lora_B,
            adapter.scale,
            self.base_layer.bias,
            dropout_p=adapter.dropout if self.training else 0.0,
            magnitude=adapter.lora_magnitude_vector,
        )

    def _update(self, x: Tensor, adapter: LoraAdapter) -> Tensor:
        a = adapter.lora_A
        dropped = F.dropout(x, adapter.dropout, self.training).to(a.dtype)
        return adapter.scale * F.linear(F.linear(dropped, a), adapter.lora_B)

    def _by_row(self, x: Tensor, route: Route) -> Tensor:
        """One product with W for all rows, then each adapter on its own; DoRA's rows anew."""
        check_rows(x, route.count)
        y = self.base_layer(x)
        for name, rows in route.groups.items():
            if name not in self.adapters:
                continue
            adapter, own = self.adapters[name], x.index_select(0, rows)
            if adapter.lora_magnitude_vector is not None:
                y = y.index_copy(0, rows, self._fused(own, adapter).to(y.dtype))
            else:
                y = y.index_add(0, rows, self._update(own, adapter).to(y.dtype))
        return y

    def merged_weight(self) -> Tensor:
        """W with the active adapters in it, [N, K], in W's dtype."""
        weight = self.weight_nk()
        total = wide(weight)
        for adapter in self._active:
            total = total + adapter.delta()
            if adapter.lora_magnitude_vector is not None:
                factor = wide(adapter.lora_magnitude_vector) / total.norm(dim=1)
                total = total * factor.unsqueeze(1)
        return total.to(weight.dtype)
