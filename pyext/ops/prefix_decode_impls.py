"""Who computes prefix_decode_attention: C++ on a CPU, CUDA C++ on a GPU, plain torch elsewhere."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fusedpeft.ops.native import DTYPE_CODES, native
from fusedpeft.ops.prefix_attention_aten import acc_dtype
from fusedpeft.ops.prefix_decode_checks import check_values


def choose_impl(
    device_type: str,
    dtype: torch.dtype,
    cpu_half: bool | None = None,
    cuda_half: bool | None = None,
) -> tuple[str, str]:
    """(implementation, why) that `prefix_decode_attention` takes by itself. Pure but for the halves
    of fusedpeft._C, by default those that are built."""
    cpu_half = native is not None if cpu_half is None else cpu_half
    cuda_half = hasattr(native, "prefix_decode_cuda") if cuda_half is None else cuda_half
    if dtype not in DTYPE_CODES:
        return "aten", f"no kernel of ours for {dtype}: plain torch, a prefix per request in memory"
    if device_type == "cpu" and cpu_half:
        return (
            "native",
            "one C++ pass over keys and prefixes, each prefix once for all its requests",
        )
    if device_type == "cuda" and cuda_half:
        return "cuda", "split over the keys, each prefix once for all its requests"
    why = f"fusedpeft._C has no kernel for device '{device_type}'"
    return "aten", why + ": plain torch, a prefix per request in memory"


def in_blocks(t: Tensor, block_table: Tensor) -> Tensor:
    """[num_blocks, HKV, block_size, D] -> [B, HKV, blocks · block_size, D]; blocks that are not
    there are some other."""
    rows = (
        t[block_table.long().clamp(0, max(t.shape[0] - 1, 0))]
        if t.shape[0]
        else t.new_empty(*block_table.shape, *t.shape[1:])
    )
    return rows.transpose(1, 2).flatten(2, 3)


def forward(q, k, v, pk, pv, plen, slots, lengths, block_table, scale: float, window: int, impl):
    args = (q, k, v, pk, pv, plen, slots, lengths, block_table, scale, window)
    if impl == "native":
        return _native(*args)
    check_values(slots, plen, k, lengths, block_table, q.shape[2], window)
    return (_cuda if impl == "cuda" else _aten)(*args)


def as_slots(pk: Tensor, pv: Tensor, ids: Tensor | None, rows: int) -> tuple[Tensor, ...]:
    """The prefix as `prefix_attention` takes it -> pk, pv [n, HKV, P, D], their lengths, slots."""
    new = dict(dtype=torch.int32, device=pk.device)
    if pk.ndim == 3:
        pk, pv, slots = pk.unsqueeze(0), pv.unsqueeze(0), torch.zeros(rows, **new)
    else:
        slots = torch.arange(rows, **new) if ids is None else ids.to(torch.int32)
    return pk, pv, torch.full((pk.shape[0],), pk.shape[2], **new), slots


def _unit(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _sizes(q: Tensor, k: Tensor, pk: Tensor, block_table: Tensor | None) -> tuple[int, ...]:
    """B, H, HKV, T, S, D, slots, longest prefix, blocks' row stride, block_size, num_blocks."""
    (B, H, T, D), (n, HKV, S) = q.shape, k.shape[:3]
    if block_table is None:
        return B, H, HKV, T, S, D, pk.shape[0], pk.shape[2], 0, 1, 0
    blocks = (block_table.stride(0), S, n)
    return B, H, HKV, T, block_table.shape[1] * S, D, pk.shape[0], pk.shape[2], *blocks


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _operands(q, k, v, pk, pv, plen, slots, lengths, block_table, scale, window):
    """Tensors as the kernels take them, and the results; the caller keeps them until the launch."""
    small = (None if t is None else t.contiguous() for t in (slots, plen, lengths, block_table))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return [q.contiguous(), *(_unit(t) for t in (k, v, pk, pv)), *small, out, lse]


def _native(q, k, v, pk, pv, plen, slots, lengths, block_table, scale, window):
    tensors = _operands(q, k, v, pk, pv, plen, slots, lengths, block_table, scale, window)
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    *sizes, stride, block, blocks = _sizes(q, tensors[1], pk, tensors[8])
    native.prefix_decode(
        *map(_address, tensors), *sizes, *(t.stride()[:3] for t in tensors[1:5]),
        stride, block, blocks, scale, window, DTYPE_CODES[q.dtype],
    )  # fmt: skip
    return tensors[-2], tensors[-1]


@functools.lru_cache(64)
def _shared(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Lengths and slots where every row has the one prefix. Never written to."""
    with torch.inference_mode(False):
        return torch.full((1,), length, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)


def native_shared(q, k, v, pk, pv, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """One prefix [HKV, P, D] for all rows, of what `plainly_decodes` has said yes to."""
    lengths, slots = _shared(q.shape[0], pk.shape[1])
    return _native(q, k, v, pk[None], pv[None], lengths, slots, None, None, scale, window)


def choose_splits(units: int, keys: int, processors: int) -> int:
    """Into how many chunks the keys of each of `units` go: four blocks for each processor where
    that leaves 128 keys to a chunk, at most 64 for the merging to read. Pure."""
    wanted = -(-4 * processors // max(units, 1))
    return max(1, min(wanted, -(-keys // 128), 64))


def _cuda(q, k, v, pk, pv, plen, slots, lengths, block_table, scale, window):
    tensors = _operands(q, k, v, pk, pv, plen, slots, lengths, block_table, scale, window)
    *sizes, stride, block, blocks = _sizes(q, tensors[1], pk, tensors[8])
    B, H, HKV, T, S, D, _, P = sizes
    tiles = HKV * -(-(H // HKV * T) // 16)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    splits = choose_splits(B * tiles, S if window == 0 else min(S, window + T), processors)
    prefix_splits = max(1, min(-(-P // 128), 64))  # as if all had one: then they are few
    work = torch.empty(
        B * H * T * (prefix_splits + splits) * (D + 2), dtype=torch.float32, device=q.device
    )
    with torch.cuda.device(q.device):
        native.prefix_decode_cuda(
            *map(_address, tensors), *sizes, *(t.stride()[:3] for t in tensors[1:5]),
            stride, block, blocks, scale, window, DTYPE_CODES[q.dtype], _address(work),
            prefix_splits, splits, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return tensors[-2], tensors[-1]


def _aten(q, k, v, pk, pv, plen, slots, lengths, block_table, scale, window):
    """Any device and dtype: prefixes gathered by request, all in one masked softmax. No values are
    read, so that a GPU is not waited for."""
    (B, H, T, _), HKV, n, acc = q.shape, k.shape[1], pk.shape[0], acc_dtype(q)
    arange = lambda size: torch.arange(size, device=q.device)  # noqa: E731
    at = slots.long()
    bad = (at < -1) | (at >= n)
    size = torch.zeros_like(at)
    if n:
        inside = at.clamp(0, n - 1)
        size = torch.where(at < 0, 0, plen[inside].long())
        bad |= (size < 0) | (size > pk.shape[2])
        pk, pv = pk[inside], pv[inside]
    else:
        pk, pv = (t.new_empty(B, HKV, 0, t.shape[3]) for t in (pk, pv))
    blocks = k.shape
    if block_table is not None:
        k, v = in_blocks(k, block_table), in_blocks(v, block_table)
    S = k.shape[2]
    end = torch.full_like(at, S) if lengths is None else lengths.long()
    bad |= (end < 0) | (end > S)
    last = (end[:, None] - T + arange(T))[:, :, None]  # [B, T, 1], where each query stands
    seen = (arange(S) <= last) & (arange(S) > last - (window or S + T))
    if block_table is not None:
        named = seen.view(B, T, -1, blocks[2]).any(3).any(1)
        bad |= (named & ((block_table < 0) | (block_table >= blocks[0]))).any(1)
    of_prefix = (arange(pk.shape[2]) < size[:, None])[:, None].expand(B, T, -1)
    seen = torch.cat([of_prefix, seen], 2)
    held = seen.any(1)[:, None, :, None]  # elsewhere may lie anything, NaN as well
    kv = ((torch.cat(t, 2).to(acc).masked_fill(~held, 0.0)) for t in ((pk, k), (pv, v)))
    k, v = (t.repeat_interleave(H // HKV, 1) for t in kv)
    z = (q.to(acc) @ k.transpose(2, 3) * scale).masked_fill(~seen[:, None], -math.inf)
    lse = z.logsumexp(-1)
    out = (z - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp() @ v
    bad = bad[:, None, None]
    return (
        out.masked_fill(bad.unsqueeze(-1), math.nan).to(q.dtype),
        lse.masked_fill(bad, math.nan),
    )
