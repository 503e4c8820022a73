"""A Hugging Face model whose linears read an `AdapterPool`, each row of a batch its own adapter.

Linears that read the same x (q, k and v; gate and up) are one product: their weights are moved into
one matrix, of which each keeps its rows as a view. The first of them to be called computes for all,
the others take their part of it, as long as they are called with the very same x. Linears
without adapters, the output head among them, become those of `fusedpeft.layers.linear`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusedpeft.errors import InputError
from fusedpeft.layers import frozen, kv_cache
from fusedpeft.layers.state import SERVED, State
from fusedpeft.ops.multi_lora import multi_lora_linear
from fusedpeft.ops.multi_lora_cpu import prepared
from fusedpeft.ops.slots import LoRASlots
from fusedpeft.serve.model_places import width
from fusedpeft.serve.sublayers import install_sublayers

if TYPE_CHECKING:
    from fusedpeft.serve.pool import AdapterPool


class Batch:
    """What is computed now: the slot of each row, and what the model's modules leave each other."""

    def __init__(
        self, slots: Tensor, sizes: list[list[int] | None], by_token: bool, cached: bool
    ) -> None:
        self.over = False  # its slots were let go of
        self.slots = slots
        self.by_token = by_token
        self.cached = cached  # soft prompts lie in the cache, as tokens like any other
        self.flat = -1  # rows of x where the model lays all tokens end to end
        self.sizes = sizes  # of each row's adapter by column, None for a row without
        self.by_rows = {slots.shape[0]: slots}  # rows of x -> the slot of each
        self.made: dict = {}  # by a served module: what it has found out for this batch
        self.group: _Group | None = None  # a stacked product in the making
        self.x: Tensor | None = None
        self.version = 0  # of x: a model may write to it between two of the linears
        self.parts: list[Tensor | None] = []
        self.stream: Tensor | None = None  # what an FFN was given
        self.cut = 0  # positions of soft prompts in front

    def of(self, x: Tensor) -> Tensor:
        """x [rows, …, K]: the slot of a row of the batch goes for all of its tokens, if not by
        token."""
        rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
        count = self.slots.shape[0]
        if x.ndim > 2 and x.shape[0] == count:
            self.flat = rows  # OPT's FFN and the experts that all share see them so
        if (rows if self.by_token else x.shape[0]) != count and not (
            x.ndim == 2 and rows == self.flat
        ):
            what = "tokens" if self.by_token else "rows"
            raise ValueError(
                f"batch: expected {count} {what}, one for each name, got x {tuple(x.shape)}"
            )
        found = self.by_rows.get(rows)
        if found is None:
            found = self.slots.repeat_interleave(rows // count)
            self.by_rows[rows] = found
        return found

    def lengths(self, column: int) -> list[int]:
        """The size of each row's adapter in one place, 0 where it has none there."""
        return [0 if sizes is None else sizes[column] for sizes in self.sizes]


class Current:
    """The batch that is open here: in this thread, and where asyncio runs, in this task."""

    def __init__(self) -> None:
        self._open: ContextVar[Batch | None] = ContextVar("fusedpeft_batch", default=None)
        self._count = 0  # of batches that are open anywhere
        self._lock = threading.Lock()
        self._grad = _Gradients()

    @property
    def batch(self) -> Batch | None:
        batch = self._open.get()
        if batch is None:
            if self._count:
                raise InputError(
                    "batch: none is open here, though one is in another thread or task: open it "
                    "where the model runs, for rows of the base alone with names [None, …]"
                )
        elif batch.over:
            raise InputError("batch: the one that was open where this task was started has ended")
        return batch

    def check_none(self) -> None:
        batch = self._open.get()
        if batch is not None and not batch.over:
            raise InputError(
                "batch: one is open here already: name all rows in one batch, or give requests "
                "that take turns (generators) a thread or an asyncio task each"
            )

    def enter(self, batch: Batch) -> None:
        with self._lock:
            self._count += 1
        self._open.set(batch)
        self._grad.off()

    def leave(self, batch: Batch) -> None:
        batch.over = True
        with self._lock:
            self._count -= 1
        if self._open.get() is batch:
            self._open.set(None)
        self._grad.on()


class _Gradients(threading.local):
    """Off while a batch is open in this thread. Not torch.no_grad: tasks end in any order."""

    count, before = 0, True

    def off(self) -> None:
        if not self.count:
            self.before = torch.is_grad_enabled()
        self.count += 1
        torch.set_grad_enabled(False)

    def on(self) -> None:
        if not self.count:  # a generator that another thread has closed
            return
        self.count -= 1
        if not self.count:
            torch.set_grad_enabled(self.before)


def _refuse(*_) -> NoReturn:
    raise InputError(
        "expected a model that no pool serves to be copied or pickled: uninstall it first"
    )


class _Group:
    """Linears that one call computes."""

    def __init__(self, modules: list[nn.Module], slots: LoRASlots) -> None:
        self.modules, self.slots = modules, slots
        weights = [_weight(m) for m in modules]
        self.w = weights[0] if len(modules) == 1 else torch.cat(weights)
        self.w = self.w.contiguous()
        biases = [m.bias for m in modules]
        self.bias = None
        if biases[0] is not None:
            self.bias = biases[0].detach() if len(modules) == 1 else torch.cat(biases).detach()
        self._point()
        self.given = [(m._parameters, m.weight, m.bias) for m in modules]
        self.few = prepared(self.w, slots, self.bias)

    def _point(self) -> None:
        """The modules' weights are rows of self.w, biases parts of self.bias: they are there once,
        and who writes to them in place writes to what is computed with."""
        sizes = self.slots.sizes
        for module, w in zip(self.modules, self.w.split(sizes), strict=True):
            module.weight.data = w.t() if isinstance(module, Conv1D) else w
        if self.bias is not None:
            for module, bias in zip(self.modules, self.bias.split(sizes), strict=True):
                module.bias.data = bias

    def restore(self) -> None:
        """Weights in memory of their own again: what saves or moves a model expects that."""
        for module in self.modules:
            if len(self.modules) > 1 or isinstance(module, Conv1D):
                for one in (module.weight, module.bias):
                    if one is not None:
                        one.data = one.data.clone(memory_format=torch.contiguous_format)
            del module.forward

    def compute(self, x: Tensor, batch: Batch) -> Tensor:
        for held, weight, bias in self.given:
            if held["weight"] is not weight or held["bias"] is not bias:
                raise InputError(
                    "batch: expected the weights that were there when the model was installed, got "
                    "others (load_state_dict with assign=True?): uninstall it, then install it"
                )
        slots = batch.of(x)
        try:
            y = self.few(x, slots)
            return multi_lora_linear(x, self.w, self.slots, slots, self.bias) if y is None else y
        except TypeError as error:
            if x.dtype == self.w.dtype:
                raise
            raise InputError(
                f"batch: expected {self.w.dtype}, as the model had when it was installed, got "
                f"{x.dtype}: uninstall it before it is converted, and make a pool for it anew"
            ) from error


def _weight(module: nn.Module) -> Tensor:
    """[N, K]"""
    weight = module.weight.detach()
    return weight.t() if isinstance(module, Conv1D) else weight


class Serving:
    """The installed model of a pool, and the batch of each thread and task."""

    def __init__(self, pool: AdapterPool) -> None:
        self.pool, self.undo = pool, ()
        self.current = Current()

    @torch.no_grad()
    def install(self, model: nn.Module) -> None:
        if self.undo:
            raise InputError("install: the pool serves a model already; uninstall it first")
        if attached := list(getattr(model, "_fusedpeft", State()).configs):
            raise InputError(
                f"install: expected a model without attached adapters, got {attached}: detach them"
            )
        if SERVED in model.__dict__:
            raise InputError("install: the model is served by a pool already; uninstall that first")
        linears = self._linears(model)
        with ExitStack() as undo:
            frozen.hasten(model)
            undo.callback(frozen.restore, model)
            undo.callback(kv_cache.hook(model).remove)
            self._install_linears(linears, undo)
            install_sublayers(model, self.pool, self.current, undo)
            for name in (SERVED, "__deepcopy__", "__reduce_ex__"):
                setattr(model, name, _refuse)  # a copy's linears would be those of this one
                undo.callback(delattr, model, name)
            self.undo = undo.pop_all()

    def _linears(self, model: nn.Module) -> list[tuple[list[nn.Module], LoRASlots]]:
        modules_of, found = dict(model.named_modules()), []
        for paths in self.pool.stacked():
            slots, modules = self.pool.at(*paths), [modules_of.get(p) for p in paths]
            for path, module, n in zip(paths, modules, slots.sizes, strict=True):
                wanted, kind = (n, slots.a.shape[2]), type(module).__name__
                if module is None:
                    raise InputError(
                        f"install: expected the model that the pool was made for, with a linear at "
                        f"{path}, got a {type(model).__name__} that has none there"
                    )
                if not isinstance(module, nn.Linear | Conv1D) or width(module) != wanted:
                    raise InputError(f"install: expected a linear {wanted} at {path}, got {kind}")
                if "forward" in module.__dict__:
                    raise InputError(f"install: {path} has a forward of its own already")
            found.append((modules, slots))
        return found

    def _install_linears(self, found: list[tuple[list[nn.Module], LoRASlots]], undo: ExitStack):
        for modules, slots in found:
            group = _Group(modules, slots)
            undo.callback(group.restore)
            for i, module in enumerate(modules):
                single = len(modules) == 1
                module.forward = self._alone(group) if single else self._part(group, i)

    def uninstall(self) -> None:
        if self.undo:
            self.undo.close()
        self.undo = ()

    @contextmanager
    def batch(self, names: Sequence[str | None], by_token: bool) -> Iterator[None]:
        self._check_free()
        slots = self.pool.acquire(names)
        try:
            with self.batch_of(slots, by_token):
                yield
        finally:
            self.pool.release(slots)

    @contextmanager
    def batch_of(
        self, slots: Sequence[int], by_token: bool = False, cached: bool = False
    ) -> Iterator[None]:
        self._check_free()
        where = torch.tensor(slots, dtype=torch.int32, device=self.pool.device)
        sizes = [None if s < 0 else self.pool.sizes(s) for s in slots]
        batch = Batch(where, sizes, by_token, cached)
        self.current.enter(batch)
        try:
            yield
        finally:
            self.current.leave(batch)

    def _check_free(self) -> None:
        if not self.undo:
            raise InputError("batch: expected a model that reads the pool: pool.install(model)")
        self.current.check_none()

    def _alone(self, group: _Group) -> Callable[[Tensor], Tensor]:
        current, module = self.current, group.modules[0]
        base = type(module).forward

        def forward(x: Tensor) -> Tensor:
            batch = current.batch
            return base(module, x) if batch is None else group.compute(x, batch)

        return forward

    def _part(self, group: _Group, i: int) -> Callable[[Tensor], Tensor]:
        current, module, sizes = self.current, group.modules[i], group.slots.sizes
        base = type(module).forward

        def forward(x: Tensor) -> Tensor:
            batch = current.batch
            if batch is None:
                return base(module, x)
            version = 0 if x.is_inference() else x._version
            same = batch.group is group and batch.x is x and batch.version == version
            if not same or batch.parts[i] is None:
                batch.group, batch.x, batch.version = group, x, version
                batch.parts = list(group.compute(x, batch).split_with_sizes(sizes, -1))
            part, batch.parts[i] = batch.parts[i], None
            if all(p is None for p in batch.parts):
                batch.group = batch.x = None
            return part

        return forward
