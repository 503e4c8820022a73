"""Losses over ranked answers to a prompt: the reward model's ranking loss, and PRO.

Both take flat tensors, one entry a candidate in any order, with an integer group id per candidate.
They are n × n in the number of candidates of a batch (tens), so plain torch is near free; what
costs are the log-probabilities beneath them (`linear_logprob`). No host synchronisation, no loops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.arguments import check_number


def _check(**tensors: Tensor) -> None:
    (first, ref), *_ = tensors.items()
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if t.ndim != 1 or t.shape != ref.shape:
            raise ValueError(
                f"{name}: expected [n] as {first} {list(ref.shape)}, got {list(t.shape)}"
            )
        if t.device != ref.device:
            raise ValueError(f"{name}: expected device {ref.device} (as {first}), got {t.device}")
        if t.is_complex():
            raise TypeError(f"{name}: expected a real dtype, got {t.dtype}")
    if not ref.is_floating_point():
        raise TypeError(f"{first}: expected a floating dtype, got {ref.dtype}")
    group = tensors["group"]
    if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
        raise TypeError(f"group: expected an integer dtype, got {group.dtype}")


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def ranking_loss(scores: Tensor, rank: Tensor, group: Tensor) -> Tensor:
    """Mean over a group's ordered pairs of −log σ(s_better − s_worse), then mean over the groups.

    scores [n] floating, rank [n] (0 is best; ties make no pair), group [n] integer ids, in any
    order. Scalar, fp32 (fp64 for fp64). Groups without a pair do not count; none at all gives 0.
    Source: Ouyang et al. 2022, "InstructGPT", eq. 1.
    """
    _check(scores=scores, rank=rank, group=group)
    s = _wide(scores)
    same = group[:, None] == group[None, :]
    pair = same & (rank[:, None] < rank[None, :])
    pairs_in_group = (same.to(s.dtype) @ pair.to(s.dtype).sum(1)).clamp(min=1.0)
    weight = pair / pairs_in_group[:, None]  # sums to 1 over a group
    loss = (weight * F.softplus(s[None, :] - s[:, None])).sum()
    return loss / weight.sum().clamp(min=1.0)


def ranking_loss_ref(scores: Tensor, rank: Tensor, group: Tensor) -> Tensor:
    """The specification: loops over groups and pairs."""
    losses = []
    for g in group.unique():
        s, r = scores[group == g], rank[group == g]
        pairs = [
            -F.logsigmoid(s[i] - s[j]) for i in range(len(s)) for j in range(len(s)) if r[i] < r[j]
        ]
        if pairs:
            losses.append(torch.stack(pairs).mean())
    return torch.stack(losses).mean() if losses else scores.sum() * 0.0


def pro_loss(
    logp_sum: Tensor, length: Tensor, reward: Tensor, group: Tensor, *, sft_weight: float = 0.05
) -> Tensor:
    """Preference ranking optimisation (Song et al. 2023, eq. 6–8). In a group, best first:

        s_i = logp_sum_i / length_i,   T_k = max_{i>k}(r_k − r_i)
        L_k = logsumexp(s_k T_k, {s_i (r_k − r_i)}_{i>k}) − s_k T_k
        L = Σ_{k<n} L_k + sft_weight · (n−1)² · (−logp_sum of the best),   mean over the groups

    logp_sum [n] (nats, summed over the answer), length [n] (tokens, ≥ 1), reward [n], group [n]
    integer ids; any order (sorted inside by reward; equal rewards keep their order). Gradients
    reach logp_sum only. Scalar, fp32 (fp64 for fp64); an empty batch gives 0.
    """
    _check(logp_sum=logp_sum, length=length, reward=reward, group=group)
    check_number("sft_weight", sft_weight)
    read = length.device.type == "cpu" and not torch.compiler.is_compiling()
    if read and length.numel() and not length.min() >= 1:
        raise ValueError(f"length: expected tokens, at least 1, got {length.min().item()}")
    total = _wide(logp_sum)
    r = reward.detach().to(total.dtype)
    s = total / length.to(total.dtype)
    n = torch.arange(len(r), device=r.device)
    same = group[:, None] == group[None, :]
    ahead = (r[:, None] > r[None, :]) | ((r[:, None] == r[None, :]) & (n[:, None] < n[None, :]))
    worse = same & ahead  # worse[k, i]: i comes after k in k's group

    gap = (r[:, None] - r[None, :]).where(worse, 0.0)
    temperature = gap.max(1).values if len(r) else r  # T_k
    own = s * temperature
    others = (s[None, :] * gap).masked_fill(~worse, float("-inf"))
    ranking = torch.cat([own[:, None], others], 1).logsumexp(1) - own  # 0 for the last of a group

    is_best = ~worse.any(0)
    others_in_group = (same.sum(1) - 1).to(total.dtype)
    sft = -total * sft_weight * others_in_group.square()
    return (ranking.sum() + sft.where(is_best, 0.0).sum()) / is_best.sum().clamp(min=1)


def pro_loss_ref(logp_sum, length, reward, group, *, sft_weight: float = 0.05) -> Tensor:
    """The specification: loops over groups and candidates."""
    losses = []
    for g in group.unique():
        at = (group == g).nonzero().squeeze(1)
        at = at[reward[at].argsort(descending=True, stable=True)]
        s, r, n = logp_sum[at] / length[at], reward[at], len(at)
        loss = sft_weight * (n - 1) ** 2 * -logp_sum[at[0]]
        for k in range(n - 1):
            t = (r[k] - r[k + 1 :]).max()
            terms = torch.cat([(s[k] * t).reshape(1), s[k + 1 :] * (r[k] - r[k + 1 :])])
            loss = loss + terms.logsumexp(0) - s[k] * t
        losses.append(loss)
    return torch.stack(losses).mean() if losses else logp_sum.sum() * 0.0
