"""Measures on rows that nothing was trained on. Every one leaves the model's mode as it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusedpeft.data.rows import ASPECTS
from fusedpeft.train.chat import Tokens, encode
from fusedpeft.train.models import RewardModel, TokenLogprobs
from fusedpeft.train.objectives import Batch, pad
from fusedpeft.train.trainer import pad_id, row_limit

Row = dict[str, Any]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Measure:
    """How rows are measured: batches of `batch_size` sequences of similar length, at most
    `max_length` tokens each (the model's limit by default), longer ones cut where `truncate`."""

    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 16
    max_length: int | None = None
    truncate: bool = False

    def _batches(self, sequences: list[Tokens]) -> Iterator[list[int]]:
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
        for i in range(0, len(order), self.batch_size):
            yield order[i : i + self.batch_size]

    def logprobs(
        self, model: PreTrainedModel, rows: Sequence[Row], answers: Sequence[Sequence[str]]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each row (sums of log p in nats, lengths in tokens) of its answers, fp64."""
        module = TokenLogprobs(model)
        sequences, owner = self._sequences(module.config, rows, answers)
        total = torch.zeros(len(sequences), dtype=torch.float64)
        length = torch.zeros(len(sequences), dtype=torch.float64)
        with _evaluating(model):
            for batch in self._batches(sequences):
                made = self._pad(sequences, batch, model)
                logp = module(made["input_ids"], made["attention_mask"], made["labels"])
                total[batch] = logp.double().sum(1).cpu()
                length[batch] = (made["labels"][:, 1:] != -100).sum(1).double().cpu()
        return [(total[at], length[at]) for at in owner]

    def scores(
        self, model: RewardModel, rows: Sequence[Row], answers: Sequence[Sequence[str]]
    ) -> list[Tensor]:
        """For each row the scores of its answers by aspect, [n, 2], fp64."""
        sequences, owner = self._sequences(model.config, rows, answers)
        scores = torch.zeros(len(sequences), len(ASPECTS), dtype=torch.float64)
        with _evaluating(model):
            for batch in self._batches(sequences):
                made = self._pad(sequences, batch, model.model)
                scores[batch] = model(made["input_ids"], made["attention_mask"]).double().cpu()
        return [scores[at] for at in owner]

    def _sequences(
        self, config: Any, rows: Sequence[Row], answers: Sequence[Sequence[str]]
    ) -> tuple[list[Tokens], list[slice]]:
        """Every answer with its prompt as tokens, and for each row the slice that is its own."""
        limit = row_limit(config, self.max_length)
        sequences: list[Tokens] = []
        owner = []
        for row, said in zip(rows, answers, strict=True):
            start = len(sequences)
            sequences += encode(
                self.tokenizer,
                row["prompt"],
                said,
                max_length=limit,
                truncate=self.truncate,
                where=row.get("where", "row"),
            )
            owner.append(slice(start, len(sequences)))
        return sequences, owner

    def _pad(self, sequences: list[Tokens], batch: list[int], model: PreTrainedModel) -> Batch:
        made = pad([sequences[i] for i in batch], pad_id(self.tokenizer))
        return {name: value.to(model.device) for name, value in made.items()}

    def sft_loss(self, model: PreTrainedModel, rows: Sequence[Row]) -> float:
        """Mean negative log-likelihood of the answers' tokens, nats a token."""
        found = self.logprobs(model, rows, [[row["response"]] for row in rows])
        total = sum(float(logp.sum()) for logp, _ in found)
        return -total / sum(float(length.sum()) for _, length in found)

    def reward_accuracy(self, model: RewardModel, rows: Sequence[Row]) -> dict[str, float]:
        """Share of pairs whose chosen answer scores higher: {"overall", and each aspect that the
        rows name}. A tie counts half; NaN where a score is not finite."""
        found = self.scores(model, rows, [[row["chosen"], row["rejected"]] for row in rows])
        right: dict[str, list[float]] = {"overall": []}
        for row, scores in zip(rows, found, strict=True):
            score = combine(scores, row["aspect"], model.trained)
            win = 0.5 if score[0] == score[1] else float(score[0] > score[1])
            win = win if score.isfinite().all() else math.nan
            right["overall"].append(win)
            if row["aspect"] is not None:
                right.setdefault(row["aspect"], []).append(win)
        return {name: sum(wins) / len(wins) for name, wins in right.items()}

    def ranking_accuracy(self, model: PreTrainedModel, rows: Sequence[Row]) -> float | None:
        """Share of a list's ordered pairs whose better answer has the higher mean log-prob, mean
        over the lists (Meng et al. 2024 for pairs); None where all rewards tie, NaN where a
        log-prob is not finite."""
        found = self.logprobs(model, rows, [row["responses"] for row in rows])
        shares = []
        for row, (logp, length) in zip(rows, found, strict=True):
            reward, mean = torch.tensor(row["rewards"]), logp / length
            better = reward[:, None] > reward[None, :]
            if better.any():
                ahead = (mean[:, None] > mean[None, :])[better].double().mean()
                shares.append(float(ahead) if mean.isfinite().all() else math.nan)
        return sum(shares) / len(shares) if shares else None

    def spread(self, judge: RewardModel, rows: Sequence[Row]) -> Tensor:
        """Each head's standard deviation [2] over the rows' responses, about the mean of those to
        one prompt: the unit of `rewards`. 1 where the responses do not differ."""
        found = self.scores(judge, rows, [row["responses"] for row in rows])
        centred = torch.cat([s - s.mean(0) for s in found])
        spread = centred.square().mean(0).sqrt()
        rounding = 1e-5 * torch.cat(found).abs().mean(0)  # of fp32, from one batch to another
        return spread.where(spread > rounding, 1.0)

    def rewards(
        self, judge: RewardModel, rows: Sequence[Row], answers: Sequence[str], spread: Tensor
    ) -> list[float]:
        """The judge's reward of one answer a row, against the row's own responses: 0 is as good as
        their mean, 1 is one standard deviation better.

        A reward is defined up to a constant a prompt, and each head has its own unit: so each is
        centred on the responses to the prompt and divided by its `spread`, and only then are
        helpfulness and safety added. A row with an aspect is judged by that head alone.
        """
        scores = self.scores(
            judge, rows, [[*row["responses"], a] for row, a in zip(rows, answers, strict=True)]
        )
        return [
            float(combine((s[-1:] - s[:-1].mean(0)) / spread, row["aspect"], judge.trained)[0])
            for row, s in zip(rows, scores, strict=True)
        ]


def combine(scores: Tensor, aspect: str | None, trained: Sequence[str]) -> Tensor:
    """[n, 2] -> [n]: the head of the aspect, or the sum of the trained heads."""
    names = [aspect] if aspect in trained else trained
    return scores[:, [ASPECTS.index(name) for name in names]].sum(1)
