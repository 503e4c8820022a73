"""The attention that transformers calls once a model has a prefix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fusedpeft.errors import InputError
from fusedpeft.ops.arguments import is_plain
from fusedpeft.ops.prefix_attention_checks import plainly_decodes
from fusedpeft.ops.prefix_decode_impls import native_shared

IMPLEMENTATION = "fusedpeft"  # transformers' name for it
# The attribute of an attention module that has its prefixes: current() is None or the one that acts
# now, which attend() takes; by_row, whether rows have prefixes of their own.
CHILD = "fusedpeft_prefix"
_NOT_HERE = ("softcap", "s_aux")  # what other models' attention asks for


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options,
) -> tuple[Tensor, None]:
    """transformers' attention by sdpa, but a decoded token that sees all keys is answered on a CPU
    by the kernel of prefix_decode_attention, with no prefix. As `_attention` below."""
    get = options.get
    rare = get("dropout") or get("output_attentions") or get("softcap") is not None
    rare = rare or attention_mask is not None or get("position_bias") is not None
    if query.shape[2] == 1 and not rare:
        none, scale = key.new_empty(key.shape[1], 0, key.shape[3]), get("scaling")
        given = (query, key, value, none, none)
        if is_plain(given) and plainly_decodes(*given, True, None, scale):
            scale = key.shape[3] ** -0.5 if scale is None else scale
            return native_shared(*given, scale, 0)[0].transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls: q [B, H, T, D], k and v [B, HKV, S, D] -> [B, T, H, D].

    position_bias [1, H, T, S] (T5's) is added to the scores; the prefix has one of its own.
    """
    own = getattr(module, CHILD, None)
    current = None if own is None else own.current()
    if current is None:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        if position_bias is not None:
            options["position_bias"] = position_bias
        return sdpa(module, query, key, value, attention_mask, **options)
    for name in _NOT_HERE:
        if kwargs.get(name) is not None:
            raise InputError(
                f"PrefixTuning: {type(module).__name__} asks for {name}: not supported"
            )
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = _added(attention_mask, query.dtype)  # a caller's own, of four dimensions
    if attention_mask is not None and attention_mask.requires_grad:  # Doge's
        raise InputError(
            f"PrefixTuning: {type(module).__name__} learns its attention's mask: not supported"
        )
    causal = attention_mask is None and (module.is_causal if is_causal is None else is_causal)
    tokens = query.shape[2]
    if causal and 1 < tokens < key.shape[2]:  # a static cache, empty so far: what follows is unset
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    if own.by_row and (dropout or position_bias is not None):
        raise InputError(
            "rows: prefixes by row are for attention without dropout of its weights and without a "
            f"bias of relative positions, got {type(module).__name__} with dropout {dropout}"
        )
    if dropout or position_bias is not None:
        bias = None if position_bias is None else (own.bias(), position_bias[..., : key.shape[2]])
        prefix = (t.to(query.dtype) for t in current[:2])
        out = _concatenated(
            query, key, value, *prefix, attention_mask, bias, causal, scaling, dropout
        )
    else:
        options = {"causal": causal, "scale": scaling, "mask": attention_mask}
        out = own.attend(current, query, key, value, **options)
    return out.transpose(1, 2).contiguous(), None  # as sdpa's: AFMoE views it


def _concatenated(
    q, k, v, prefix_key, prefix_value, mask, bias: tuple[Tensor, Tensor] | None, causal, scale, p
) -> Tensor:
    """What the fused op does not do is torch's, over prefix and keys one after the other: dropout
    of attention weights (GPT-2 and BERT have it in training: 0 is faster), and a bias of relative
    positions, which covers the prefix too (T5)."""
    batch, _, tokens, _ = q.shape
    k = torch.cat((prefix_key.expand(batch, -1, -1, -1), k), 2)
    v = torch.cat((prefix_value.expand(batch, -1, -1, -1), v), 2)
    length = prefix_key.shape[1]
    if mask is None and causal:
        seen = q.new_ones(tokens, k.shape[2], dtype=torch.bool).tril(k.shape[2] - tokens)
        mask = seen if bias is None else _added(seen, q.dtype)
    elif mask is not None:
        mask = F.pad(mask, (length, 0))  # added, and nothing is added to the prefix
    if bias is not None:
        added = torch.cat(bias, -1).to(q.dtype)
        mask = added if mask is None else mask + added
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p=p, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to the scores.

    The lowest number instead of -inf: a row of padding that sees nothing is to be finite also in a
    layer without a prefix.
    """
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)


def _mask(*args, dtype: torch.dtype = torch.float32, **kwargs) -> Tensor | None:
    """transformers' boolean mask as what is added to the scores; None where causality says it all.
    Once a forward, for all layers."""
    seen = sdpa_mask(*args, **kwargs)
    return None if seen is None else _added(seen, dtype)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
