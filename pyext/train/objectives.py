"""The three objectives. They differ in what they take from a row and in the loss; the rest is one.

A loss is a mean over answers' tokens or over prompts: as many as `count` finds in the batch, or as
there are in the whole step where it is accumulated over several batches.

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
    """Negative log-likelihood of the answer's tokens, mean over the tokens."""

    def answers(self, row: dict[str, Any]) -> tuple[list[str], dict[str, list[float]]]:
        return [row["response"]], {}

    def count(self, batch: Batch) -> Tensor:
        return (batch["labels"][:, 1:] != IGNORE).sum()

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | int | None = None) -> Tensor:
        logp = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
        return -logp.sum() / (self.count(batch) if count is None else count)


class Reward:
    """`ops.ranking_loss` of the chosen over the rejected answer, by the head of the row's aspect;
    a row without one trains them all alike. Mean over the rows."""

    def answers(self, row: dict[str, Any]) -> tuple[list[str], dict[str, list[float]]]:
        aspect = row["aspect"]
        weights = [1.0 if aspect in (None, name) else 0.0 for name in ASPECTS]
        values = {f"weight_{name}": [w, w] for name, w in zip(ASPECTS, weights, strict=True)}
        return [row["chosen"], row["rejected"]], {"rank": [0.0, 1.0], **values}

    def count(self, batch: Batch) -> Tensor:
        return _prompts(batch)

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | int | None = None) -> Tensor:
        scores = model(batch["input_ids"], batch["attention_mask"])
        weight = torch.stack([batch[f"weight_{name}"] for name in ASPECTS], 1)
        score = (scores * weight).sum(1)
        loss = ranking_loss(score, batch["rank"], batch["group"])
        return loss if count is None else loss * (self.count(batch) / count)


@dataclass
class Pro:
    """`ops.pro_loss` over the candidates of a prompt, mean over the prompts."""

    sft_weight: float = 0.05

    def answers(self, row: dict[str, Any]) -> tuple[list[str], dict[str, list[float]]]:
        return row["responses"], {"reward": row["rewards"]}

    def count(self, batch: Batch) -> Tensor:
        return _prompts(batch)

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | int | None = None) -> Tensor:
        logp = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
        length = (batch["labels"][:, 1:] != IGNORE).sum(1)
        loss = pro_loss(
            logp.sum(1), length, batch["reward"], batch["group"], sft_weight=self.sft_weight
        )
        return loss if count is None else loss * (self.count(batch) / count)


def _prompts(batch: Batch) -> Tensor:
    return batch["group"].max() + 1


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
