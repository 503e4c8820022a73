"""PEFT's LoRA linear with the fused op inside. Imported only where PEFT is."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusedpeft.layers.frozen import unhooked
from fusedpeft.ops import lora_linear
from fusedpeft.ops.arguments import transformed

_PLAIN_TENSORS = (nn.Parameter, Tensor)


def why_not(module: nn.Module) -> str | None:
    """Why a module of PEFT's cannot be swapped; None where it can. What may change later (active
    adapters, merging, variants, hooks) is asked in every forward instead."""
    if type(module) is not lora.Linear:
        return f"{type(module).__module__}.{type(module).__name__} is not lora.Linear"
    base = module.base_layer
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base is a {type(base).__module__}.{type(base).__name__}"
    if not base.weight.is_floating_point():
        return f"its base weight is {base.weight.dtype}"
    return None


class FusedLinear(lora.Linear):
    """lora.Linear, computed in one call where one plain adapter acts (further ones are added).

    Only `forward` differs; whatever the guards do not recognise goes to PEFT's own forward: merged
    or disabled adapters, `adapter_names`, variants other than DoRA, DoRA with dropout in training
    or beside another adapter, lora_bias, quantised or sharded weights, hooks on inner modules,
    scalings that are tensors, torch.func's transforms.
    """

    def _get_name(self) -> str:
        return "Linear"  # PEFT's reports read the kind of a layer off its repr

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        modules = self._modules
        lora_a, lora_b = modules["lora_A"]._modules, modules["lora_B"]._modules
        active = self._active_adapter
        names = (active,) if type(active) is str else active
        names = [name for name in names if name in lora_a]
        base = modules["base_layer"]
        if not names or not self._fusable(x, base, lora_a, lora_b, names):
            return super().forward(x)

        first = names[0]
        dropout = modules["lora_dropout"]._modules[first]
        magnitude = None
        if first in self.lora_variant:  # DoRA, as _fusable has seen to
            magnitude = modules["lora_magnitude_vector"]._modules[first].weight
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        y = lora_linear(
            x,
            weight if type(base) is nn.Linear else weight.t(),
            lora_a[first]._parameters["weight"],
            lora_b[first]._parameters["weight"],
            self.scaling[first],
            bias,
            dropout_p=dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
            magnitude=magnitude,
        )
        if len(names) == 1:
            return y
        result = y
        for name in names[1:]:
            inner = modules["lora_dropout"]._modules[name](
                self._cast_input_dtype(x, lora_a[name].weight.dtype)
            )
            result = result + lora_b[name](lora_a[name](inner)) * self.scaling[name]
        return result.to(y.dtype)

    def _fusable(
        self,
        x: Tensor,
        base: nn.Module,
        lora_a: dict[str, nn.Module],
        lora_b: dict[str, nn.Module],
        names: list[str],
    ) -> bool:
        if type(base) is not nn.Linear and type(base) is not Conv1D:
            return False  # the base was exchanged after the swap
        weight = base._parameters.get("weight")  # once a layer a token: no nn.Module.__getattr__
        if type(weight) not in _PLAIN_TENSORS or not unhooked(base):
            return False
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return False  # PEFT's answer, be it an error
        if not x.dtype.is_floating_point or not weight.dtype.is_floating_point:
            return False
        if self.ephemeral_gpu_offload or transformed():
            return False  # torch.func's transforms: the op has no rule for them
        dropouts, casts = self._modules["lora_dropout"]._modules, self.cast_input_dtype_enabled
        for name in names:
            a, b, dropout = lora_a[name], lora_b[name], dropouts[name]
            if isinstance(self.scaling[name], Tensor):
                return False  # for a compiled hotswap, which writes to it
            if type(a) is not nn.Linear or type(b) is not nn.Linear:
                return False
            wa, wb = a._parameters.get("weight"), b._parameters.get("weight")
            if type(wa) not in _PLAIN_TENSORS or type(wb) not in _PLAIN_TENSORS:
                return False
            dtype = wa.dtype
            if b._parameters["bias"] is not None or dtype != wb.dtype:
                return False
            if not casts and x.dtype != dtype:
                return False
            if dtype != weight.dtype and dtype != torch.float32:
                return False
            if type(dropout) is nn.Dropout:
                if dropout.p >= 1.0:  # the op refuses what PEFT computes: no update at all
                    return False
            elif type(dropout) is not nn.Identity:
                return False
            if not (unhooked(a) and unhooked(b) and unhooked(dropout)):
                return False
            variant = self.lora_variant.get(name)
            if variant is not None:
                drops = type(dropout) is nn.Dropout and self.training
                if type(variant) is not DoraLinearVariant or len(names) > 1 or drops:
                    return False
        return True
