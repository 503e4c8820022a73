"""The layers: adapters on Hugging Face models, PEFT's checkpoints, PEFT models made fast."""

from fusedpeft.layers.accelerate import AccelerateReport, accelerate
from fusedpeft.layers.attach import activate, attach, detach, trainable_parameters
from fusedpeft.layers.checkpoint import load_adapter, save_adapter
from fusedpeft.layers.config import (
    BottleneckAdapter,
    FeatureBased,
    FullFineTuning,
    LoRA,
    OutputLayer,
    PrefixTuning,
    PromptTuning,
)
from fusedpeft.layers.lora import LoraLinear
from fusedpeft.layers.loss import fuse_loss
from fusedpeft.layers.merge import merge, unmerge
from fusedpeft.layers.rows import rows

__all__ = [
    "AccelerateReport",
    "BottleneckAdapter",
    "FeatureBased",
    "FullFineTuning",
    "LoRA",
    "LoraLinear",
    "OutputLayer",
    "PrefixTuning",
    "PromptTuning",
    "accelerate",
    "activate",
    "attach",
    "detach",
    "fuse_loss",
    "load_adapter",
    "merge",
    "rows",
    "save_adapter",
    "trainable_parameters",
    "unmerge",
]
