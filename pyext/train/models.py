"""What the objectives ask of a causal LM: log-probabilities of labels, or scores of answers.

Both are modules whose `forward` is all that training calls, so that data-parallel wrappers see it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedpeft.data.rows import ASPECTS
from fusedpeft.errors import InputError
from fusedpeft.layers import load_adapter, save_adapter
from fusedpeft.layers.loss import logit_options
from fusedpeft.ops import linear_logprob

HEAD_NAME = "reward_head.safetensors"


def split_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """(backbone, output head). Raises InputError for a model whose head is not an nn.Linear."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"expected a causal LM with an nn.Linear as output head, got {type(head).__name__} in "
            f"{type(model).__name__}: leave the head out of the adapter's targets"
        )
    return model.base_model, head


class TokenLogprobs(nn.Module):
    """log p of each label under a causal LM, without the logits in memory."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        split_head(model)
        self.model = model

    @property
    def config(self):
        return self.model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """ids, mask, labels [n, T] -> fp32 [n, T-1]; entry t is of labels[:, t+1], 0 for -100."""
        backbone, head = split_head(self.model)
        out = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        h = out.last_hidden_state[:, :-1]
        options = logit_options(self.config)
        return linear_logprob(h, head.weight, labels[:, 1:], head.bias, **options)


class RewardModel(nn.Module):
    """A causal LM's backbone with one score for each aspect, read at the last real token.

    heads: nn.Linear [2, d] in fp32 (helpful, safe), the bias left out: rewards are defined up to a
    constant. trained: the aspects that its data had; the other head says nothing.
    """

    def __init__(self, model: PreTrainedModel, trained: tuple[str, ...] = ASPECTS):
        super().__init__()
        self.model, self.trained = model, trained
        d = model.config.get_text_config().hidden_size
        self.heads = nn.Linear(d, len(ASPECTS), bias=False, device=model.device)
        nn.init.normal_(self.heads.weight, std=1 / math.sqrt(d + 1))

    @property
    def config(self):
        return self.model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ids, mask [n, T], padded on the right -> scores [n, 2], fp32."""
        out = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )
        last = attention_mask.sum(1) - 1
        h = out.last_hidden_state[torch.arange(len(last), device=last.device), last]
        return self.heads(h.float())

    def save(self, folder: Path) -> None:
        """The adapter in PEFT's format, the heads beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {"heads": self.heads.weight.detach().cpu().contiguous()},
            folder / HEAD_NAME,
            # One key: the order of several is not the same from file to file.
            metadata={"trained": ",".join(self.trained)},
        )
        save_adapter(self.model, folder)

    @classmethod
    def load(cls, folder: Path, base: PreTrainedModel) -> RewardModel:
        """Put a saved reward model on its base, in evaluation mode. Raises InputError for a missing
        or damaged file and for another base."""
        path = Path(folder) / HEAD_NAME
        try:
            with safe_open(path, framework="pt") as file:
                weight, metadata = file.get_tensor("heads"), file.metadata() or {}
        except FileNotFoundError as error:
            raise InputError(f"expected a reward model's {path}, there is none") from error
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}): train it again") from error
        trained = tuple(a for a in metadata.get("trained", "").split(",") if a in ASPECTS)
        made = cls(load_adapter(base, folder), trained or ASPECTS)
        if made.heads.weight.shape != weight.shape:
            raise InputError(
                f"{path}: expected heads {list(made.heads.weight.shape)} for this base, "
                f"got {list(weight.shape)}"
            )
        with torch.no_grad():
            made.heads.weight.copy_(weight)
        return made.eval().requires_grad_(False)
