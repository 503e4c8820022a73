"""An adapter of its own for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from fusedpeft.errors import InputError
from fusedpeft.layers.state import METHODS, State, require_unmerged, state_of, unwrap


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within it, row i of every batch takes adapter names[i], None the base alone.

        with fp.rows(model, ["korean", "english", None]):
            model(input_ids)          # [3, T]
        model(input_ids, adapter_names=["korean", "english", None])  # the same, for one call

    LoRA of any ranks, DoRA, bottleneck adapters in any placement, prefixes of one length; they may
    meet in a batch. W is read once for all rows. It trains as well: those that `activate` chose get
    gradients, each from its own rows. Not for prompts, heads and full fine-tuning, which change
    more than rows. Raises InputError for an unknown name, a method that cannot, also where one is
    active, prefixes of several lengths, a merged model, and in forward for a batch of another
    size.
    """
    inner = unwrap(model)
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise InputError(f"rows: expected a list of names, one for each row, got {names!r}")
    state = state_of(inner)
    require_unmerged(state, "choose by row")
    for name in state.active:
        if not hasattr(METHODS[type(state.configs[name])], "route"):
            kind = type(state.configs[name]).__name__
            raise InputError(
                f"rows: {name!r}, a {kind}, is active and acts on whole batches: activate None or "
                "others first"
            )
    for name in dict.fromkeys(n for n in names if n is not None):
        state_of(inner, name)
        if not hasattr(METHODS[type(state.configs[name])], "route"):
            kind = type(state.configs[name]).__name__
            raise InputError(
                f"rows: {name!r} is a {kind}, which acts on whole batches: activate it"
            )
    outer, state.by_row = state.by_row, names
    try:
        _route(inner, state)
        yield model
    finally:
        state.by_row = outer
        _route(inner, state)


def _route(model: nn.Module, state: State) -> None:
    for method in dict.fromkeys(METHODS.values()):
        if hasattr(method, "route"):
            own = [
                n if n is not None and METHODS[type(state.configs[n])] is method else None
                for n in state.by_row or ()
            ]
            method.route(model, own or None)


class AdapterNames:
    """Hooks on the model: forward's `adapter_names=[…]`, PEFT's keyword, is `rows` for that call.

    PEFT's "__base__" is None. Raises InputError as `rows` does, and under gradient checkpointing.
    """

    _KEY = "adapter_names"  # transformers' models pass on what they do not know: taken out here

    def __init__(self) -> None:
        self._open: AbstractContextManager | None = None

    def hook(self, model: nn.Module) -> list:
        """Registers the hooks; returns the handles."""
        return [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._close()  # what an interrupted call has left open
        if self._KEY not in kwargs:
            return None
        if (names := kwargs[self._KEY]) is not None:
            self._enter(model, names)
        return args, {key: value for key, value in kwargs.items() if key != self._KEY}

    def after(self, model: nn.Module, args: tuple, output: object) -> None:
        self._close()

    def _enter(self, model: nn.Module, names: Sequence[str | None]) -> None:
        again = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        if model.training and again:
            raise InputError(
                "adapter_names: expected a model without gradient checkpointing, which runs layers "
                "again after the call: with fusedpeft.rows(model, names) around both passes"
            )
        if isinstance(names, (list, tuple)):
            names = [None if name == "__base__" else name for name in names]
        opened = rows(model, names)
        opened.__enter__()
        self._open = opened

    def _close(self) -> None:
        if self._open is not None:
            opened, self._open = self._open, None
            opened.__exit__(None, None, None)
