"""Training: one trainer; objectives that differ in what they read of a row and in the loss."""

from fusedpeft.train.chat import generate_answers
from fusedpeft.train.metrics import Measure
from fusedpeft.train.models import RewardModel, TokenLogprobs
from fusedpeft.train.objectives import Pro, Reward, Sft
from fusedpeft.train.trainer import Trainer

__all__ = [
    "Measure",
    "Pro",
    "Reward",
    "RewardModel",
    "Sft",
    "TokenLogprobs",
    "Trainer",
    "generate_answers",
]
