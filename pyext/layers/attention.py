"""The attention that transformers calls once a model has a prefix: `ops.prefix_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fusedpeft.errors import InputError
from fusedpeft.ops import prefix_attention

IMPLEMENTATION = "fusedpeft"  # transformers' name for it
CHILD = "fusedpeft_prefix"  # the child of an attention module whose current() is the prefix
_NOT_HERE = ("softcap", "s_aux", "position_bias")  # what other models' attention asks for


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls: q [B, H, T, D], k and v [B, HKV, S, D] -> [B, T, H, D]."""
    own = getattr(module, CHILD, None)
    current = None if own is None else own.current()
    if current is None:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in _NOT_HERE:
        if kwargs.get(name) is not None:
            raise InputError(
                f"PrefixTuning: {type(module).__name__} asks for {name}: not supported"
            )
    *prefix, ids = current
    prefix_key, prefix_value = (t.to(query.dtype) for t in prefix)
    causal = attention_mask is None and (module.is_causal if is_causal is None else is_causal)
    tokens = query.shape[2]
    if causal and 1 < tokens < key.shape[2]:  # a static cache, empty so far: what follows is unset
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    if dropout and ids is not None:
        raise InputError(
            f"rows: prefixes by row train without dropout of attention weights, got {dropout}: set "
            "the model's attention dropout to 0"
        )
    if dropout:
        out = _with_dropout(
            query, key, value, prefix_key, prefix_value, attention_mask, causal, scaling, dropout
        )
    else:
        out = prefix_attention(
            query, key, value, prefix_key, prefix_value,
            causal=causal, scale=scaling, mask=attention_mask, prefix_ids=ids,
        )  # fmt: skip
    return out.transpose(1, 2), None


def _with_dropout(q, k, v, prefix_key, prefix_value, mask, causal, scale, p: float) -> Tensor:
    """Dropout of attention weights, as GPT-2 has it in training, is torch's: prefix and keys are
    concatenated for it. Set the model's attention dropout to 0 for the fused path."""
    batch, _, tokens, _ = q.shape
    k = torch.cat((prefix_key.expand(batch, -1, -1, -1), k), 2)
    v = torch.cat((prefix_value.expand(batch, -1, -1, -1), v), 2)
    length = prefix_key.shape[1]
    if mask is None and causal:
        seen = q.new_ones(tokens, k.shape[2], dtype=torch.bool)
        mask = seen.tril(k.shape[2] - tokens)
    elif mask is not None:
        mask = F.pad(mask, (length, 0))  # added, and nothing is added to the prefix
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p=p, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _mask(*args, dtype: torch.dtype = torch.float32, **kwargs) -> Tensor | None:
    """transformers' boolean mask as what is added to the scores; None where causality says it all.

    Once a forward, for all layers. The lowest number instead of -inf: a row of padding that sees
    nothing is to be finite also in a layer without a prefix.
    """
    seen = sdpa_mask(*args, **kwargs)
    if seen is None:
        return None
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
