"""An adapter of its own for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from fusedpeft.errors import InputError
from fusedpeft.layers.attach import METHODS, require_unmerged, state_of, unwrap


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within it, row i of every batch takes adapter names[i], None the base alone.

        with fp.rows(model, ["korean", "english", None]):
            model(input_ids)          # [3, T]

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
    routed = [method for method in dict.fromkeys(METHODS.values()) if hasattr(method, "route")]
    try:
        for method in routed:
            own = [
                n if n is not None and METHODS[type(state.configs[n])] is method else None
                for n in names
            ]
            method.route(inner, own)
        yield model
    finally:
        for method in routed:
            method.route(inner, None)
