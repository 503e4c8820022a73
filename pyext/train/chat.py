"""Conversations as tokens, and greedy answers.

A tokenizer with a chat template says itself how a conversation is written. One without (a base
model's) gets HH-RLHF's plain form, "\\n\\nHuman: …\\n\\nAssistant: …", begun and ended with the
tokenizer's own tokens. The prompt's tokens are the same in training, where an answer follows, and
in generation, where it is yet to come. The answer's are those after them in the whole text; where
the two would melt into each other, those of the answer alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fusedpeft.errors import InputError

Messages = Sequence[dict[str, str]]

_NAMES = {"system": "System", "user": "Human", "assistant": "Assistant"}


class Tokens(NamedTuple):
    """A prompt with an answer: the ids of both and how many of them are the prompt's."""

    ids: list[int]
    prompt_length: int


def max_positions(config) -> int | None:
    """How many tokens the model takes; None where its configuration names no limit."""
    for name in ("max_position_embeddings", "n_positions"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return None


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> str:
    if tokenizer.chat_template:
        try:
            return tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja's errors and whatever the template itself raises
            raise InputError(f"the chat template refuses the conversation: {error}") from error
    turns = "".join(f"\n\n{_NAMES[m['role']]}: {m['content']}" for m in prompt)
    return f"{tokenizer.bos_token or ''}{turns}\n\nAssistant:"


def _answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: str) -> str:
    end = tokenizer.eos_token or ""
    if not tokenizer.chat_template:
        return f" {answer}{end}"
    said = [*prompt, {"role": "assistant", "content": answer}]
    start, whole = (
        _prompt_text(tokenizer, prompt),
        tokenizer.apply_chat_template(said, tokenize=False),
    )
    # A template that writes past answers otherwise than the one to come (without its thoughts,
    # say) does not tell how an answer ends; the end token does.
    return whole[len(start) :] if whole.startswith(start) else answer + end


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _said(
    tokenizer: PreTrainedTokenizerBase, start: str, asked: list[int], answer: str
) -> list[int]:
    """The ids of `answer` after `start`, whose ids are `asked`."""
    # Not of the answer alone: SentencePiece would put another space before it.
    whole = _ids(tokenizer, start + answer)
    if whole[: len(asked)] == asked:
        return whole[len(asked) :]
    return _ids(tokenizer, answer)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    """The ids up to where the assistant begins."""
    return _ids(tokenizer, _prompt_text(tokenizer, prompt))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    answers: Sequence[str],
    *,
    max_length: int | None,
    truncate: bool,
    where: str = "row",
) -> list[Tokens]:
    """The prompt with each of the answers, at most `max_length` tokens.

    A longer one raises InputError, or with `truncate` loses the prompt's beginning down to half of
    max_length, then the answer's end. An answer has at least one token (its end).
    """
    start_text = _prompt_text(tokenizer, prompt)
    asked = _ids(tokenizer, start_text)
    found = []
    for answer in answers:
        said = _said(tokenizer, start_text, asked, _answer_text(tokenizer, prompt, answer))
        total = len(asked) + len(said)
        start = asked
        if not said or not asked:
            raise InputError(f"{where}: expected text, the prompt or the answer has no token")
        if max_length is not None and total > max_length:
            if not truncate:
                raise InputError(
                    f"{where}: expected at most {max_length} tokens, got {total}: raise "
                    f"max_length if the model takes more, or set truncate: true"
                )
            said = said[: max_length - min(len(asked), max_length // 2)]
            start = asked[-(max_length - len(said)) :]
        found.append(Tokens([*start, *said], len(start)))
    return found


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers, in the prompts' order."""
    asked = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return continue_greedily(
        model, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size
    )


def continue_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """The text after each sequence of ids, up to an end token. A sequence too long for the model
    and what is to come loses its beginning. The model's mode is left as it was."""
    limit = max_positions(model.config)
    check_new_tokens(model.config, max_new_tokens)
    if limit is not None:
        sequences = [ids[-(limit - max_new_tokens) :] for ids in sequences]
    texts = [""] * len(sequences)
    was_training = model.training
    model.eval()
    try:
        for batch in _by_length(sequences, batch_size):
            made = _generate(model, tokenizer, [sequences[i] for i in batch], max_new_tokens)
            for i, text in zip(batch, made, strict=True):
                texts[i] = text
    finally:
        model.train(was_training)
    return texts


def check_new_tokens(config, max_new_tokens: int, name: str = "max_new_tokens") -> None:
    """Raises InputError where the model takes no prompt before so many tokens."""
    limit = max_positions(config)
    if limit is not None and max_new_tokens >= limit:
        raise InputError(
            f"{name}: expected less than the {limit} tokens the model takes, got {max_new_tokens}"
        )


@contextlib.contextmanager
def greedily(model: PreTrainedModel, **settings: Any) -> Iterator[GenerationConfig]:
    """A configuration of greedy decoding and `settings`, the model's own in the meantime: what a
    base's generation_config.json says of penalties, bans and sampling would be mixed into it."""
    own = model.generation_config
    plain = GenerationConfig(
        **{name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        | {"do_sample": False, **settings}
    )
    model.generation_config = plain
    try:
        yield plain
    finally:
        model.generation_config = own


def _by_length(sequences: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length: little padding."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[list[int]],
    max_new_tokens: int,
) -> list[str]:
    width = max(map(len, asked))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(asked), width), pad or 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(asked):  # on the left: the answer begins where the prompt ends
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    settings = {"pad_token_id": pad or 0, "eos_token_id": sorted(ends) or None}
    with torch.no_grad(), greedily(model, max_new_tokens=max_new_tokens, **settings) as config:
        out = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    return [t.strip() for t in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]
