"""What the checks under Triton's interpreter share."""

import math
import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> None:
    """The interpreter puts its own functions into triton.language, a few hundred, at every call of
    a device function, and takes them out after a launch: two fifths of the time. In this process
    they go in once and stay. Nor is a type's dtype in numpy looked up anew for each operand."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()
    look_up, dtypes = interpreter._get_np_dtype, {}

    def once(fn):
        if fn not in done:
            done.add(fn)
            patch(fn)
        return interpreter._LangPatchScope()  # of no changes, so that nothing is restored

    def dtype(of):
        name = of.scalar.name  # a block's is its elements'
        if name not in dtypes:
            dtypes[name] = look_up(of)
        return dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = once, dtype
    # A sum that overflows is looked for in int64, and what was found goes to a device_assert, which
    # does nothing unless options.debug is set: nothing is lost but another third of the time.
    assert not interpreter.interpreter_builder.options.debug
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Every fresh buffer starts as NaN: an element that no kernel writes shows."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
