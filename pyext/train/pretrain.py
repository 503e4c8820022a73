"""Pretrain a tiny Llama from nothing: a byte-level tokenizer, then next-token prediction.

    fusedpeft pretrain OUT --text FILE...
    fusedpeft pretrain OUT --quickstart     # the quickstart's data and base, from their seed

Documents are lines of text. They are joined with the end token between them and read in blocks of
fixed length from random places; the place of every block follows from the seed and the step alone,
so that an interrupted run continues as if nothing had happened. All is made in OUT.partial, which
takes OUT's name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusedpeft.data.quickstart import write_quickstart
from fusedpeft.errors import InputError
from fusedpeft.train.tokenizer import train_tokenizer

_HELD_OUT = 50  # one document in so many is measured, never trained on
_STATE, _RESULT = "pretrain_state.pt", "pretrain.json"
_QUIET_SECONDS = 15.0


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. The defaults are the quickstart's base."""

    vocab_size: int = 1280
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 384
    max_positions: int = 512


def pretrain(
    text: Path | list[Path],
    out: Path,
    *,
    shape: Shape | None = None,
    steps: int = 1500,
    batch_size: int = 32,
    block_tokens: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    save_steps: int = 100,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a tokenizer and a Llama on text files and write both to `out` (Hugging Face's format,
    fp32) with `pretrain.json`: the settings, the curve, losses on held-out documents in nats a
    token, seconds, tokens/s. Returns that file's content.

    AdamW (0.9, 0.95), linear warm-up over a twentieth of the steps, then a cosine to a tenth.
    A run that was interrupted continues from its last `save_steps`; a complete `out` of the same
    text and settings is left as it is. Raises InputError for unusable text or settings, for an
    `out` that holds something else, and where the loss is no longer finite.
    """
    shape = shape or Shape()
    text = [text] if isinstance(text, (str, Path)) else list(text)
    out, console = Path(out), console or Console(stderr=True)
    documents = _documents(text)
    settings = {
        "text": [Path(p).name for p in text],
        "text_sha256": hashlib.sha256("\n".join(documents).encode()).hexdigest()[:16],
        "shape": asdict(shape),
        "steps": steps,
        "batch_size": batch_size,
        "block_tokens": block_tokens,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    _check(settings, shape, save_steps)
    done = _complete(out, settings)
    if done is not None:
        return done

    held = documents[::_HELD_OUT]
    documents = [d for i, d in enumerate(documents) if i % _HELD_OUT]
    tokenizer = train_tokenizer(documents, shape.vocab_size, shape.max_positions)
    stream, held_stream = _encode(tokenizer, documents), _encode(tokenizer, held)
    for name, tokens in (("text", stream), ("held-out text", held_stream)):
        if len(tokens) <= block_tokens:
            raise InputError(
                f"the {name} has {len(tokens)} tokens: expected more than block_tokens "
                f"({block_tokens}); give more text or a smaller block"
            )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_llama_config(shape, tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    partial = _make_partial(out)
    state = _load_state(partial / _STATE, settings)
    if state is None:
        before = evaluate_loss(model, held_stream, block_tokens)
        history, first, spent = [], 0, 0.0
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        before, history = state["before"], state["history"]
        first, spent = state["step"], state["seconds"]

    started = time.monotonic() - spent
    every = max(1, steps // 50)
    model.train()
    for step in _progress(console, first, steps, history):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        batch = _batch(stream, seed, step, batch_size, block_tokens)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == steps:
            history.append({"step": step + 1, "loss": round(_finite(loss.item(), step), 5)})
        if (step + 1) % save_steps == 0 and step + 1 < steps:
            _save_state(
                partial / _STATE,
                {
                    "settings": settings,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "before": before,
                    "history": history,
                    "step": step + 1,
                    "seconds": time.monotonic() - started,
                },
            )
    seconds = time.monotonic() - started
    result = {
        "settings": settings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_documents": len(documents),
        "held_out_documents": len(held),
        "train_tokens": len(stream),
        "eval_loss_before": before,
        "eval_loss_after": _finite(evaluate_loss(model, held_stream, block_tokens), steps - 1),
        "seconds": round(seconds, 1),
        "tokens_per_s": round(steps * batch_size * block_tokens / seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "history": history,
    }
    model.eval()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / _RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out)  # `out` is there complete or not at all
    (out / _STATE).unlink(missing_ok=True)
    return result


def remake_quickstart(
    folder: Path, *, seed: int = 0, console: Console | None = None
) -> dict[str, Any]:
    """Write the quickstart's files to `folder`/data and pretrain its base on them in `folder`/base:
    what examples/quickstart holds. Returns `pretrain`'s result; raises what it raises.

    The data are the same bytes anywhere; the base is the same bits on the same machine with the
    same number of threads.
    """
    write_quickstart(folder / "data", seed)
    text, base = folder / "data" / "pretrain.txt", folder / "base"
    return pretrain(text, base, steps=2000, seed=seed, console=console)


def _documents(text: list[Path]) -> list[str]:
    documents: list[str] = []
    for path in text:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: expected a UTF-8 text file ({error})") from error
        documents += [line.strip() for line in lines if line.strip()]
    if len(documents) < 2:
        raise InputError(
            f"{', '.join(map(str, text))}: expected at least 2 documents (lines), "
            f"got {len(documents)}"
        )
    return documents


def _check(settings: dict[str, Any], shape: Shape, save_steps: int) -> None:
    names = ("steps", "batch_size", "block_tokens", "learning_rate")
    numbers = {name: settings[name] for name in names} | asdict(shape) | {"save_steps": save_steps}
    for name, value in numbers.items():
        if not value > 0:
            raise InputError(f"{name}: expected a positive number, got {value}")
    if shape.hidden_size % shape.heads or shape.heads % shape.kv_heads:
        raise InputError(
            f"heads: expected hidden_size ({shape.hidden_size}) to divide by heads "
            f"({shape.heads}) and heads by kv_heads ({shape.kv_heads})"
        )
    if settings["block_tokens"] > shape.max_positions:
        raise InputError(
            f"block_tokens: expected at most max_positions ({shape.max_positions}), "
            f"got {settings['block_tokens']}"
        )


def _complete(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a complete run in `out`, None where there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / _RESULT).is_file():
        raise InputError(f"{out} already holds something that is not ours: name another folder")
    try:
        done = json.loads((out / _RESULT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{out / _RESULT} is damaged ({error}): name another folder") from error
    if done.get("settings") != settings:
        raise InputError(
            f"{out} holds a model of other text or settings: remove it or name another folder"
        )
    (out / _STATE).unlink(missing_ok=True)
    return done


def _make_partial(out: Path) -> Path:
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot make this folder ({error})") from error
    return partial


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at step {step + 1}: expected a finite number; lower learning_rate"
        )
    return loss


def _encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """[n] int64: the documents' tokens, the end token after each."""
    end = tokenizer.eos_token_id
    rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, end)])


def _llama_config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _batch(stream: Tensor, seed: int, step: int, rows: int, length: int) -> Tensor:
    """[rows, length] tokens from places that seed and step determine."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - length + 1, (rows,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]


@torch.no_grad()
def evaluate_loss(model: LlamaForCausalLM, stream: Tensor, length: int) -> float:
    """Mean negative log-likelihood in nats a token over consecutive blocks of `length`."""
    was_training = model.training
    model.eval()
    blocks = stream[: len(stream) // length * length].view(-1, length)
    total = 0.0
    for rows in blocks.split(64):
        total += model(input_ids=rows, labels=rows).loss.item() * len(rows)
    model.train(was_training)
    return total / len(blocks)


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _progress(
    console: Console, first: int, steps: int, history: list[dict[str, float]]
) -> Iterator[int]:
    """first … steps − 1, shown as a bar on a terminal and as a line now and then elsewhere."""
    columns = (
        TextColumn("pretrain"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    told = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("pretrain", total=steps, completed=first, loss="")
        for step in range(first, steps):
            yield step
            loss = f"loss {history[-1]['loss']:.3f}" if history else ""
            bar.update(task, completed=step + 1, loss=loss)
            if not console.is_terminal and time.monotonic() - told > _QUIET_SECONDS:
                told = time.monotonic()
                console.print(f"pretrain: step {step + 1} of {steps} {loss}")


def _save_state(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _load_state(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True)
    if state["settings"] != settings:
        raise InputError(
            f"{path.parent} belongs to a run of other text or settings: remove it or name "
            f"another folder"
        )
    return state
