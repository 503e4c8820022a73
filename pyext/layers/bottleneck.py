"""Bottleneck adapters on a model, placed as AdapterHub defines it.

With h what attention or the feed-forward network (FFN) puts out, r the residual stream before it,
and A(x) = scale · (act(norm(x) Dᵀ + c) Uᵀ + e):

    houlsby    h + A(h) after attention and after the FFN           (Houlsby et al. 2019, fig. 2)
    pfeiffer   after the FFN: A(r + h) + r + h; where norms come after, with s = r + h,
               norm(s + A(norm(s)))                                 (Pfeiffer et al. 2021, §3.1)
    parallel   h + A(r) at the FFN                                  (He et al. 2022, §3.3)

Each is one call of `ops.bottleneck_adapter`, from a hook on the module whose output it changes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from fusedpeft.errors import InputError
from fusedpeft.layers.blocks import Block, blocks
from fusedpeft.layers.config import BottleneckAdapter
from fusedpeft.layers.routing import Route, check_rows, route_of
from fusedpeft.ops import bottleneck_adapter


class Bottleneck(nn.Module):
    """The parameters of one adapter in one place: down [E, d], down_bias [E], up [d, E],
    up_bias [d], and norm_weight, norm_bias [d] of its own norm or None."""

    def __init__(self, config: BottleneckAdapter, like: Tensor, dim: int):
        super().__init__()
        where = {
            "dtype": torch.promote_types(like.dtype, torch.float32),
            "device": like.device,
        }
        down = torch.empty(config.size, dim, **where)
        self.down = nn.Parameter(nn.init.kaiming_uniform_(down, a=math.sqrt(5)))
        self.down_bias = nn.Parameter(torch.zeros(config.size, **where))
        self.up = nn.Parameter(torch.zeros(dim, config.size, **where))  # nothing changes at first
        self.up_bias = nn.Parameter(torch.zeros(dim, **where))
        weight, bias = config.norm is not None, config.norm == "layer_norm"
        self.norm_weight = nn.Parameter(torch.ones(dim, **where)) if weight else None
        self.norm_bias = nn.Parameter(torch.zeros(dim, **where)) if bias else None
        self.config = config

    def extra_repr(self) -> str:
        size, dim = self.down.shape
        return f"{dim} -> {size} -> {dim}, {self.config.activation}, scale={self.config.scale:g}"

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        config = self.config
        return bottleneck_adapter(
            x, self.down, self.down_bias, self.up, self.up_bias, activation=config.activation,
            scale=config.scale, residual=residual, norm=config.norm, norm_weight=self.norm_weight,
            norm_bias=self.norm_bias, dropout_p=config.dropout if self.training else 0.0,
        )  # fmt: skip


class Hooks:
    """What changes a module's output: each of `steps` takes (x, residual) to the new residual."""

    _stream: Tensor | None = None  # what the FFN was given

    def steps(self) -> Sequence[Callable[[Tensor, Tensor], Tensor]]:
        raise NotImplementedError

    def hook(self, module: nn.Module, block: Block, name: str) -> list:
        """Registers the hook of that name; returns the handles."""
        handles = [module.register_forward_hook(getattr(self, name))]
        if name == "parallel":
            kept = block.ffn_in.register_forward_pre_hook(self.keep_stream, with_kwargs=True)
            handles.append(kept)
        return handles

    # Hooks: (module, args, output) -> the new output, which may be a tuple that begins with it.

    def serial(self, module: nn.Module, args: tuple, output):
        h = _first(output)
        for step in self.steps():
            h = step(h, h)
        return _with_first(output, h)

    def around_norm(self, module: nn.Module, args: tuple, output):
        (stream,) = args
        for step in self.steps():
            stream = step(output, stream)
            output = module.forward(stream)
        return output

    def keep_stream(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.steps():
            self._stream = args[0] if args else next(iter(kwargs.values()))

    def parallel(self, module: nn.Module, args: tuple, output):
        steps = self.steps()
        if not steps:
            return output
        stream, self._stream = self._stream, None
        h = _first(output)
        for step in steps:
            h = step(stream, h)
        return _with_first(output, h)


class Bottlenecks(Hooks, nn.Module):
    """A child of the module whose output they change: the adapters by name, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self._active: tuple[Bottleneck, ...] = ()
        self._route: Route | None = None  # within `rows`: an adapter a row
        self._handles: list = []

    def activate(self, names: Sequence[str]) -> None:
        self._active = tuple(self.adapters[n] for n in names if n in self.adapters)
        for adapter in self.adapters.values():
            adapter.requires_grad_(adapter in self._active)

    def steps(self) -> Sequence[Callable[[Tensor, Tensor], Tensor]]:
        return self._active if self._route is None else (self._by_row,)

    def _by_row(self, x: Tensor, residual: Tensor) -> Tensor:
        """Each row's own adapter; the others keep their residual."""
        check_rows(x, self._route.count)
        y = residual
        for name, rows in self._route.groups.items():
            if name in self.adapters:
                own = residual.index_select(0, rows)
                chosen = own if x is residual else x.index_select(0, rows)
                y = y.index_copy(0, rows, self.adapters[name](chosen, own))
        return y


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _with_first(output, new: Tensor):
    return (new, *output[1:]) if isinstance(output, tuple) else new


# --- the method ---------------------------------------------------------------------------------


def places(block: Block, placement: str) -> list[tuple[nn.Module, str, str]]:
    """(module, the hook of Bottlenecks, AdapterHub's name of the place) for each adapter."""
    attention, ffn = block.hub
    if placement == "houlsby":
        return [(block.attention, "serial", attention), (block.ffn, "serial", ffn)]
    if placement == "pfeiffer":
        return [(block.out, "around_norm" if block.post_norm else "serial", ffn)]
    return [(block.ffn, "parallel", ffn)]


def adapters_of(
    model: nn.Module, config: BottleneckAdapter, name: str
) -> Iterator[tuple[str, Bottleneck]]:
    """(AdapterHub's path of the place, the adapter there)."""
    for block in blocks(model):
        for module, hook, hub in places(block, config.placement):
            yield f"{block.path}.{hub}", module._modules[_child(hook)].adapters[name]


def hub_places(model: nn.Module, config: BottleneckAdapter) -> list[str]:
    """AdapterHub's paths of the places, whether there is an adapter or not."""
    found = [(b.path, hub) for b in blocks(model) for _, _, hub in places(b, config.placement)]
    return [f"{path}.{hub}" for path, hub in found]


def _child(hook: str) -> str:
    return f"fusedpeft_{hook}"


def plan(model: nn.Module, config: BottleneckAdapter, strict: bool) -> list[Block]:
    found = list(blocks(model))
    if not found:
        raise InputError(
            "BottleneckAdapter: expected a model whose layers are known (Llama, Mistral, Qwen, "
            "Gemma, OLMo, GPT-2, BERT, RoBERTa, BART, T5, or built alike), got "
            f"{type(model).__name__}"
        )
    if not hasattr(model.config, "hidden_size"):
        raise InputError(
            "BottleneckAdapter: expected a model whose layers have one width, config.hidden_size, "
            f"got {type(model).__name__}, of several parts"
        )
    if config.norm == "rms_norm":
        warnings.warn(
            "BottleneckAdapter: norm='rms_norm' trains, but save_adapter cannot write it, as "
            "AdapterHub's format has none: take norm='layer_norm' for an adapter to keep",
            stacklevel=4,
        )
    return found


def add(model: nn.Module, config: BottleneckAdapter, name: str, found: list[Block]) -> None:
    dim = model.config.hidden_size
    for block in found:
        # OLMo's and Dory's norms have no parameters.
        near = (block.ffn_in, block.ffn, model)
        like = next(chain.from_iterable(m.parameters() for m in near))
        for module, hook, _ in places(block, config.placement):
            child = module._modules.get(_child(hook))
            if child is None:
                child = Bottlenecks()
                child._handles = child.hook(module, block, hook)
                module.add_module(_child(hook), child)
            child.adapters[name] = Bottleneck(config, like, dim)
            child.train(module.training)


def check_together(wanted: Mapping[str, BottleneckAdapter]) -> None:
    pass  # they stack


def _everywhere(model: nn.Module) -> list[tuple[nn.Module, str, Bottlenecks]]:
    return [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if isinstance(child, Bottlenecks)
    ]


def activate(model: nn.Module, names: Sequence[str]) -> None:
    for _, _, child in _everywhere(model):
        child.activate(names)


def route(model: nn.Module, names: Sequence[str | None] | None) -> None:
    for _, _, child in _everywhere(model):
        child._route = route_of(names, next(child.parameters()).device)


def remove(model: nn.Module, name: str) -> None:
    for module, key, child in _everywhere(model):
        if name in child.adapters:
            del child.adapters[name]
        if not child.adapters:
            for handle in child._handles:
                handle.remove()
            del module._modules[key]
