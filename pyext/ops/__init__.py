"""The ops: pure functions over tensors with autograd, each beside its plain-torch specification."""

from fusedpeft.ops.lora import lora_linear, lora_linear_ref

__all__ = ["lora_linear", "lora_linear_ref"]
