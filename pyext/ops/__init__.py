"""The ops: pure functions over tensors with autograd, each beside its plain-torch specification."""

from fusedpeft.ops.adapter import bottleneck_adapter, bottleneck_adapter_ref
from fusedpeft.ops.linear_logprob import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    linear_logprob,
    linear_logprob_ref,
)
from fusedpeft.ops.lora import lora_linear, lora_linear_ref
from fusedpeft.ops.lora_multi import lora_linear_multi, lora_linear_multi_ref
from fusedpeft.ops.multi_adapter import multi_bottleneck_adapter, multi_bottleneck_adapter_ref
from fusedpeft.ops.multi_lora import multi_lora_linear, multi_lora_linear_ref
from fusedpeft.ops.preference import pro_loss, pro_loss_ref, ranking_loss, ranking_loss_ref
from fusedpeft.ops.prefix_attention import prefix_attention, prefix_attention_ref
from fusedpeft.ops.prefix_decode import prefix_decode_attention, prefix_decode_attention_ref
from fusedpeft.ops.quantised import FP8Weight, NF4Weight
from fusedpeft.ops.soft_prompt import soft_prompt_embedding, soft_prompt_embedding_ref

__all__ = [
    "FP8Weight",
    "NF4Weight",
    "bottleneck_adapter",
    "bottleneck_adapter_ref",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "linear_logprob",
    "linear_logprob_ref",
    "lora_linear",
    "lora_linear_multi",
    "lora_linear_multi_ref",
    "lora_linear_ref",
    "multi_lora_linear",
    "multi_lora_linear_ref",
    "prefix_attention",
    "prefix_attention_ref",
    "multi_bottleneck_adapter",
    "multi_bottleneck_adapter_ref",
    "prefix_decode_attention",
    "prefix_decode_attention_ref",
    "pro_loss",
    "pro_loss_ref",
    "ranking_loss",
    "ranking_loss_ref",
    "soft_prompt_embedding",
    "soft_prompt_embedding_ref",
]
