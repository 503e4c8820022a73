"""The three objectives. They differ in what they take from a row and in the loss; the rest is one.

A row becomes as many token sequences as it has answers; a batch of rows is one padded batch of all
their sequences, so that the candidates of a prompt share one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fusedpeft.data.rows import ASPECTS
from fusedpeft.ops import pro_loss, ranking_loss
from fusedpeft.train.chat import Tokens, encode

Batch = dict[str, Tensor]
IGNORE = -100


@dataclass
class Example:
    """A row as tokens: one sequence an answer, and numbers for each answer."""

    sequences: list[Tokens]
    values: dict[str, list[float]] = field(default_factory=dict)


class Sft:
    """Negative log-likelihood of the answer's tokens, mean over the tokens of a whole step."""

    counts_tokens = True

    def answers(self, row: dict[str, Any]) -> tuple[list[str], dict[str, list[float]]]:
        return [row["response"]], {}

    def loss(self, model: nn.Module, batch: Batch, tokens: Tensor | int | None = None) -> Tensor:
        logp = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
        if tokens is None:
            tokens = (batch["labels"][:, 1:] != IGNORE).sum()
        return -logp.sum() / tokens


class Reward:
    """`ops.ranking_loss` of the chosen over the rejected answer, by the head of the row's aspect;
    a row without one trains them all alike."""

    counts_tokens = False

    def answers(self, row: dict[str, Any]) -> tuple[list[str], dict[str, list[float]]]:
        aspect = row["aspect"]
        weights = [1.0 if aspect in (None, name) else 0.0 for name in ASPECTS]
        values = {f"weight_{name}": [w, w] for name, w in zip(ASPECTS, weights, strict=True)}
        return [row["chosen"], row["rejected"]], {"rank": [0.0, 1.0], **values}

    def loss(self, model: nn.Module, batch: Batch, tokens: Tensor | int | None = None) -> Tensor:
        scores = model(batch["input_ids"], batch["attention_mask"])
        weight = torch.stack([batch[f"weight_{name}"] for name in ASPECTS], 1)
        score = (scores * weight).sum(1)
        return ranking_loss(score, batch["rank"], batch["group"])


@dataclass
class Pro:
    """`ops.pro_loss` over the candidates of a prompt."""

    sft_weight: float = 0.05
    counts_tokens = False

    def answers(self, row: dict[str, Any]) -> tuple[list[str], dict[str, list[float]]]:
        return row["responses"], {"reward": row["rewards"]}

    def loss(self, model: nn.Module, batch: Batch, tokens: Tensor | int | None = None) -> Tensor:
        logp = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
        length = (batch["labels"][:, 1:] != IGNORE).sum(1)
        return pro_loss(
            logp.sum(1), length, batch["reward"], batch["group"], sft_weight=self.sft_weight
        )


Objective = Sft | Reward | Pro


def encode_rows(
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_length: int | None,
    truncate: bool,
) -> list[Example]:
    """Raises InputError, with the row, for one of more than `max_length` tokens (see `encode`)."""
    found = []
    for row in rows:
        answers, values = objective.answers(row)
        sequences = encode(
            tokenizer,
            row["prompt"],
            answers,
            max_length=max_length,
            truncate=truncate,
            where=row.get("where", "row"),
        )
        found.append(Example(sequences, values))
    return found


def pad(sequences: Sequence[Tokens], pad_id: int) -> Batch:
    """{"input_ids", "attention_mask", "labels"} [n, T], padded on the right; labels are the
    answer's tokens and -100 elsewhere."""
    width = max(len(s.ids) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i, (tokens, prompt_length) in enumerate(sequences):
        row = torch.tensor(tokens)
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
        labels[i, prompt_length : len(row)] = row[prompt_length:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def collator(pad_id: int) -> Callable[[Sequence[Example]], Batch]:
    """Examples -> one batch: `pad` of every sequence, "group" (the example each belongs to) and the
    examples' values, [n] each."""

    def collate(examples: Sequence[Example]) -> Batch:
        batch = pad([s for e in examples for s in e.sequences], pad_id)
        counts = torch.tensor([len(e.sequences) for e in examples])
        batch["group"] = torch.arange(len(examples)).repeat_interleave(counts)
        for name in examples[0].values:
            batch[name] = torch.tensor([v for e in examples for v in e.values[name]])
        return batch

    return collate
