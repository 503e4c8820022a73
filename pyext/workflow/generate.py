"""`fusedpeft generate`: one answer from a base model, with or without an adapter."""

from __future__ import annotations

from pathlib import Path

from fusedpeft.errors import InputError
from fusedpeft.layers import load_adapter
from fusedpeft.train.chat import continue_greedily, encode_prompt
from fusedpeft.workflow.models import load_base, load_tokenizer, quiet


def generate_one(
    base: Path, prompt: str, adapter: Path | None, max_new_tokens: int, raw: bool
) -> str:
    """A greedy answer to one user turn; raw: what comes after the text as it stands. Raises
    InputError for an empty prompt and for folders without a model or adapter."""
    if not prompt.strip():
        raise InputError("prompt: expected text, got none")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt: expected UTF-8 text, got {prompt!r:.60}") from error
    quiet()
    tokenizer, model = load_tokenizer(base), load_base(base)
    if adapter is not None:
        load_adapter(model, adapter)
    if raw:
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
    return continue_greedily(model, tokenizer, [ids], max_new_tokens=max_new_tokens)[0]
