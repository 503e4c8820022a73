"""Rows of instruction and preference data, in the ecosystem's forms, as the trainer takes them.

    SFT     {"messages": [{"role", "content"}, …]}, the last one the assistant's
            {"prompt", "completion"}
            any row of pairs: its chosen answer
    pairs   {"prompt", "chosen", "rejected"}
            {"chosen", "rejected"} that hold the prompt themselves: lists of messages, or text with
            "\\n\\nHuman:" and "\\n\\nAssistant:" turns (HH-RLHF)
    lists   {"prompt", "responses"} and, for each response, "rewards"
            {"prefix", "suffix", "reward"} (PRO's own files)

A prompt is text (one user turn) or a list of messages; an answer is text or one assistant message,
with or without the prompt's messages before it (UltraFeedback). "aspect" ("helpful" or "safe") may
stand beside pairs and lists; null is as if it were not there. Other fields are ignored, but for a
list without rewards that has numbers under another of the names "reward", "rewards", "score" and
"scores": they are not read, which is an error. So is an SFT row with a blank answer; a pair of the
same answer twice is left out. Blank answers in pairs, and blank or equal ones in lists, are in
published data (HH-RLHF) and stay. Files: .jsonl, or .json with one list, either also .gz; UTF-8.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fusedpeft.errors import InputError

ASPECTS = ("helpful", "safe")
ROLES = ("system", "user", "assistant")

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_SCORES = ("reward", "rewards", "score", "scores")
_PRO_ROLES = {"<|prompter|>": "user", "<|assistant|>": "assistant"}

Messages = list[dict[str, str]]


class _Problem(Exception):
    """What is wrong with a row; the reader adds the file and the row's number."""


class _NothingToLearn(Exception):
    """A sound row that is left out."""


def load_rows(path: str | Path, form: str, aspect: str | None = None) -> list[dict[str, Any]]:
    """The rows of a file in one form: "sft" {"prompt": messages, "response"}, "pairs" {"prompt",
    "chosen", "rejected", "aspect"}, "lists" {"prompt", "responses", "rewards" or None, "aspect"}.

    Every row has "where", its file and number. aspect: of rows that name none. Raises InputError,
    with the number of the row, for a file or row that cannot be used, and for an empty file. Pairs
    of the same answer twice are left out, with a warning that counts them.
    """
    path = Path(path)
    convert = _FORMS[form]
    rows, out = [], []
    for number, raw in enumerate(_read(path), 1):
        where = f"{path} row {number}"
        try:
            if not isinstance(raw, dict):
                raise _Problem(f"expected an object, got {_show(raw)}")
            row = convert(raw)
            if form != "sft":
                row["aspect"] = _aspect(raw, aspect)
            _check_text(row)
        except _NothingToLearn:
            out.append(number)
            continue
        except RecursionError:
            raise InputError(f"{where}: expected a row, got JSON nested too deeply") from None
        except _Problem as problem:
            raise InputError(f"{where}: {problem}") from None
        rows.append({**row, "where": where})
    if out:
        which = ", ".join(map(str, out[:5])) + (", …" if len(out) > 5 else "")
        said = (
            f"{path}: left out {len(out)} of {len(rows) + len(out)} pairs, whose two answers are "
        )
        warnings.warn(f"{said}the same (row {which})", stacklevel=2)
    if not rows:
        raise InputError(f"{path}: expected rows, {'found none' if out else 'the file is empty'}")
    return rows


def split_rows(rows: list[Any], holdout: float) -> tuple[list[Any], list[Any]]:
    """(rows to train on, the last `holdout` of them), at least one held out."""
    held = min(len(rows), max(1, round(len(rows) * holdout)))
    return rows[: len(rows) - held], rows[len(rows) - held :]


# --- reading ------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[Any]:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    zipped = suffixes[-1:] == [".gz"]
    kinds = suffixes if zipped else suffixes[-1:]
    if not kinds or kinds[0] not in (".jsonl", ".json"):
        raise InputError(f"{path}: expected a .jsonl or .json file (or either with .gz)")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if zipped else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 JSON ({error})") from error
    if kinds[0] == ".json":
        rows = _json(text, str(path))
        if not isinstance(rows, list):
            raise InputError(f"{path}: expected a list of rows, got {_show(rows)}")
        yield from rows
        return
    number = 0
    # Not splitlines(): a JSON string may hold a Unicode line separator.
    for line in text.split("\n"):
        if line.strip():
            number += 1
            yield _json(line, f"{path} row {number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    except RecursionError:
        raise InputError(f"{where}: not valid JSON (nested too deeply)") from None


def _check_text(row: dict[str, Any]) -> None:
    """JSON can escape half of a surrogate pair, which is no text that a tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise _Problem(f"expected text, got {half!r}, one half of a character: mend it") from None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# --- the three forms ----------------------------------------------------------------------------


def _sft(raw: dict[str, Any]) -> dict[str, Any]:
    if "messages" in raw:
        messages = _messages(raw["messages"], "messages")
        return {"prompt": _asked(messages[:-1]), "response": _not_blank(_said(messages[-1]))}
    if "completion" in raw:
        prompt = _prompt(raw)
        said = _answer(raw["completion"], "completion", prompt)
        return {"prompt": prompt, "response": _not_blank(said)}
    if "chosen" in raw and "rejected" in raw:
        row = _pair(raw)
        return {"prompt": row["prompt"], "response": row["chosen"]}
    raise _missing(raw, "'messages', 'prompt' and 'completion', or 'chosen' and 'rejected'")


def _not_blank(answer: str) -> str:
    if not answer.strip():
        raise _Problem(f"expected an answer to learn, got {answer!r}: leave the row out")
    return answer


def _pairs(raw: dict[str, Any]) -> dict[str, Any]:
    row = _pair(raw)
    if row["chosen"] == row["rejected"]:
        raise _NothingToLearn
    return row


def _pair(raw: dict[str, Any]) -> dict[str, Any]:
    if "chosen" not in raw or "rejected" not in raw:
        raise _missing(raw, "'chosen' and 'rejected' (and 'prompt')")
    if "prompt" in raw:
        prompt = _prompt(raw)
        chosen, rejected = (_answer(raw[key], key, prompt) for key in ("chosen", "rejected"))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    both = [_dialogue(raw[key], key) for key in ("chosen", "rejected")]
    # The prompt is what both begin with, up to where the assistant speaks; what follows is the
    # answer. Mostly one turn; a few rows of HH go on from there.
    shared = 0
    for first, second in zip(*both, strict=False):
        if first != second:
            break
        shared += 1
    shared = min(shared, *(len(turns) - 1 for turns in both))
    while shared and not all(turns[shared]["role"] == "assistant" for turns in both):
        shared -= 1
    if not all(turns[shared]["role"] == "assistant" for turns in both):
        raise _Problem("chosen and rejected answer different prompts: expected one prompt")
    chosen, rejected = (_joined(turns[shared:]) for turns in both)
    return {"prompt": _asked(both[0][:shared]), "chosen": chosen, "rejected": rejected}


def _lists(raw: dict[str, Any]) -> dict[str, Any]:
    pro = "prefix" in raw and "suffix" in raw
    _no_other_scores(raw, "reward" if pro else "rewards")
    if pro:
        raw = {
            "prompt": _pro_prompt(raw["prefix"]),
            "responses": raw["suffix"],
            "rewards": raw.get("reward"),
        }
    if "responses" not in raw:
        raise _missing(raw, "'prompt' and 'responses', or 'prefix' and 'suffix'")
    responses = raw["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise _Problem(f"responses: expected a list of at least 2, got {_show(responses)}")
    prompt = _prompt(raw)
    answers = [_answer(r, f"responses[{i}]", prompt) for i, r in enumerate(responses)]
    rewards = raw.get("rewards")
    if rewards is not None:
        good = isinstance(rewards, list) and len(rewards) == len(answers)
        if not good or not all(_is_number(r) for r in rewards):
            raise _Problem(f"rewards: expected {len(answers)} finite numbers, got {_show(rewards)}")
        rewards = [float(r) for r in rewards]
    return {"prompt": prompt, "responses": answers, "rewards": rewards}


def _no_other_scores(raw: dict[str, Any], name: str) -> None:
    """Rewards under a name that is not read must not pass for none."""
    other = next((field for field in _SCORES if field != name and field in raw), None)
    if raw.get(name) is None and other is not None:
        raise _Problem(f"unknown field {other!r}: expected each response's reward in {name!r}")


_FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "sft": _sft,
    "pairs": _pairs,
    "lists": _lists,
}


def _missing(raw: dict[str, Any], expected: str) -> _Problem:
    return _Problem(f"expected {expected}, got {', '.join(map(repr, raw)) or 'no field'}")


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # of a whole number too, which may be any


def _aspect(raw: dict[str, Any], default: str | None) -> str | None:
    aspect = raw.get("aspect")
    if aspect is None:
        return default
    if aspect not in ASPECTS:
        raise _Problem(f"aspect: expected {' or '.join(ASPECTS)}, got {_show(aspect)}")
    return aspect


# --- messages -----------------------------------------------------------------------------------


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise _Problem(f"{name}: expected a list of messages, got {_show(value)}")
    for i, message in enumerate(value):
        good = isinstance(message, dict) and message.get("role") in ROLES
        if not good or not isinstance(message.get("content"), str):
            raise _Problem(
                f"{name}[{i}]: expected role ({', '.join(ROLES)}) and content (text), "
                f"got {_show(message)}"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _asked(messages: Messages) -> Messages:
    if not messages or messages[-1]["role"] == "assistant":
        raise _Problem("expected a user's turn before the answer")
    return messages


def _said(message: dict[str, str]) -> str:
    if message["role"] != "assistant":
        raise _Problem(f"expected the assistant's answer last, got the role {message['role']!r}")
    return message["content"]


def _prompt(raw: dict[str, Any]) -> Messages:
    prompt = raw.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        return _asked(_messages(prompt, "prompt"))
    raise _Problem(f"prompt: expected text or messages, got {_show(prompt)}")


def _answer(value: Any, name: str, prompt: Messages) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) in (1, len(prompt) + 1):
        *before, last = _messages(value, name)
        if not before or before == prompt:
            return _said(last)
    raise _Problem(
        f"{name}: expected text or one assistant message, alone or after the prompt's, "
        f"got {_show(value)}"
    )


def _dialogue(value: Any, name: str) -> Messages:
    if isinstance(value, list):
        return _messages(value, name)
    if not isinstance(value, str):
        raise _Problem(f"{name}: expected text or messages, got {_show(value)}")
    before, *parts = _HH_TURN.split(value)
    if before.strip() or not parts:
        raise _Problem(
            f"{name}: expected a 'prompt' beside it, or turns that begin with \\n\\nHuman: and "
            f"\\n\\nAssistant:, got {_show(value)}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": text.strip()} for who, text in pairs]


def _joined(turns: Messages) -> str:
    """An answer and, where a row goes on, the turns after it in HH's own writing."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    rest = "".join(f"\n\n{names[t['role']]}: {t['content']}" for t in turns[1:])
    return turns[0]["content"] + rest


def _pro_prompt(prefix: Any) -> Messages:
    """PRO keeps one prefix a candidate: a list of turns that ends with an open "<|assistant|>"."""
    first = prefix[0] if isinstance(prefix, list) and prefix else None
    if not isinstance(first, list) or any(other != first for other in prefix):
        raise _Problem(f"prefix: expected the same list of turns for each, got {_show(prefix)}")
    messages = []
    for i, turn in enumerate(first):
        mark = next((m for m in _PRO_ROLES if isinstance(turn, str) and turn.startswith(m)), None)
        if mark is None:
            raise _Problem(
                f"prefix[0][{i}]: expected {' or '.join(_PRO_ROLES)} first, got {_show(turn)}"
            )
        messages.append({"role": _PRO_ROLES[mark], "content": turn.removeprefix(mark).strip()})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return _asked(messages)
