"""fusedpeft: parameter-efficient fine-tuning at the cost of the frozen model.

`fusedpeft.ops` are the fused functions, `fp.attach` and `fp.LoRA` the layers over Hugging Face
models, `fp.accelerate` the one line for an existing PEFT model.
"""

import importlib

__version__ = "0.1.0"

_LAYERS = (
    "BottleneckAdapter",
    "FeatureBased",
    "FullFineTuning",
    "LoRA",
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
)
__all__ = ["AdapterPool", "__version__", "ops", *_LAYERS]


def __getattr__(name: str):
    # On first use: `import fusedpeft` and `fusedpeft --help` must not pay for torch.
    if name == "ops":
        return importlib.import_module("fusedpeft.ops")
    if name == "AdapterPool":
        return importlib.import_module("fusedpeft.serve").AdapterPool
    if name in _LAYERS:
        return getattr(importlib.import_module("fusedpeft.layers"), name)
    raise AttributeError(f"module 'fusedpeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
