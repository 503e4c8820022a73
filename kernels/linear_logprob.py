"""Log-probability of a label through the output head, for GPUs.

    z = cap(h Wᵀ + bias) / temperature      log p_t = z_t[label_t] − logsumexp_v z_t[v]
    u_t = s_label W[label_t] − Σ_v p_v s_v W[v]   (frozen head; s = dz / d(h Wᵀ))

Forward with u, by chunks of rows and, inside, of the vocabulary, in two products each:
1. logits: z in registers; exp(z − reference) leaves as the chunk's p in the inputs' dtype, with a
   reference and a sum by row and tile. The reference is the row's running one, and moves only where
   a logit lies `jump` beyond it, so that p needs no second pass to be rescaled.
2. sum: accumulator = accumulator · exp(old − new reference) + p W, in fp32, of which half the bits
   lie in u's own memory (linear_logprob_kernels.py).
At the end u and log p from the accumulator and the sums. On Hopper both products have kernels of
their own (linear_logprob_tma.py). Without u: one launch over the vocabulary.
Backward with a trainable head makes the logits again, 1/64 of the vocabulary at a time for all
rows: dz, then dh += dz W (as above) and dw = dzᵀ h (whole in one accumulator).
(Online softmax: Milakov and Gimelshein 2018; Wijmans et al. 2024, "Cut Your Losses".)

FLOPs 4·M·H·V with u (6 backward: dz, dh, dw). Extra bytes: u; p and half an accumulator, about one
wave of blocks each (8.6 MB on 132 SMs); without u M·V/32 of statistics; backward M·V/32 of dz and
M·H·2 of dh's lower halves. The head is read twice by each chunk of rows. Ignored rows cost nothing.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fusedpeft.kernels.device import arch_of, on_device
from fusedpeft.kernels.linear_logprob_kernels import (
    NEVER,
    _linear_logprob_dw_kernel,
    _linear_logprob_finish_kernel,
    _linear_logprob_logits_kernel,
    _linear_logprob_merge_kernel,
    _linear_logprob_sum_kernel,
)
from fusedpeft.kernels.linear_logprob_tables import (
    FINISH_CONFIG,
    MERGE_CONFIG,
    linear_logprob_bwd_config,
    linear_logprob_fwd_config,
)
from fusedpeft.kernels.linear_logprob_tma import ByTma, fits_tma
from fusedpeft.kernels.sums import ordered_sum

__all__ = ["linear_logprob_bwd", "linear_logprob_fwd"]


def _jump(dtype: torch.dtype) -> float:
    """How far a logit may lie beyond its reference: exp of it must fit the dtype of p."""
    return 8.0 if dtype == torch.float16 else 60.0


def _order(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(rows that count first, then the others; how many count [1]), nothing read by the host."""
    keep = labels != ignore_index
    ahead = keep.cumsum(0)
    n = torch.arange(labels.shape[0], device=labels.device)
    place = torch.where(keep, ahead - 1, ahead[-1] + n - ahead)
    return torch.empty_like(n).scatter_(0, place, n), ahead[-1:].clone()


class _Problem:
    """One call: its tensors, and the launches over a chunk of rows and words."""

    def __init__(self, h, w, labels, bias, ignore_index, softcap, temperature):
        # Of what the kernels are not compiled for there are copies: see LAYOUTS in the tables.
        self.h = h if h.stride(1) == 1 else h.contiguous()
        self.w = w if 1 in w.stride() else w.contiguous()
        self.labels = labels.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.softcap, self.inv_temperature = softcap, 1.0 / temperature
        (self.M, self.H), self.V = h.shape, w.shape[0]
        self.config = dict(elem_bytes=h.element_size(), wide=self.wide())
        self.order, self.count = _order(self.labels, ignore_index)
        self.label_z = self.new(self.M)
        self.split = h.element_size() == 2

    def wide(self) -> bool:
        """Whether rows of h and w can be loaded 16 bytes at a time."""
        sizes = [self.H, self.h.stride(0), self.w.stride(0)]
        sizes += [t.data_ptr() for t in (self.h, self.w, self.bias) if t is not None]
        return self.w.stride(1) == 1 and all(n % 16 == 0 for n in sizes)

    def new(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.h.device)

    def logits(
        self, config: dict, row0: int, rows: int, v0: int, columns: int, *,
        top: Tensor | None = None, total: Tensor | None = None, ref: Tensor | None = None,
        p: Tensor | None = None, lse: Tensor | None = None, g: Tensor | None = None,
        dbias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Statistics (top, total), with p where it is given, or dz in p where g is given."""
        h, w, none = self.h, self.w, self.label_z
        keep, grad = p is not None and g is None, g is not None
        grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"]),)
        with on_device(h):
            _linear_logprob_logits_kernel[grid](
                h, w, h if self.bias is None else self.bias, self.order, self.count, self.labels,
                self.label_z, *(none if t is None else t for t in (ref, top, total, lse, g)),
                h if p is None else p, none if dbias is None else dbias,
                self.softcap, self.inv_temperature, _jump(h.dtype),
                row0, rows, v0, columns, self.H, int(self.bias is not None), int(dbias is not None),
                h.stride(0), h.stride(1), w.stride(0), w.stride(1),
                0 if top is None else top.stride(0), 0 if p is None else p.stride(0),
                KEEP=keep, GRAD=grad, SOFTCAP=self.softcap > 0.0, **config,
            )  # fmt: skip

    def add_product(
        self, config: dict, p: Tensor, out: Tensor, lo: Tensor, row0: int, rows: int, v0: int,
        columns: int, first: bool, running: tuple[Tensor, ...] | None = None, tiles: int = 0,
    ) -> None:  # fmt: skip
        """out (and lo) += p · w[v0…]; running: ref, sum, the next two, top and total of p."""
        w, none = self.w, self.label_z
        grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(self.H, config["BLOCK_N"]),)
        with on_device(w):
            _linear_logprob_sum_kernel[grid](
                p, w, self.order, self.count, self.halves(out), lo,
                *((none,) * 6 if running is None else running),
                row0, rows, v0, columns, self.H, int(first), tiles,
                p.stride(0), w.stride(0), w.stride(1), out.stride(0),
                0 if running is None else running[4].stride(0),
                RESCALE=running is not None, SPLIT=self.split, **config,
            )  # fmt: skip

    def halves(self, out: Tensor) -> Tensor:
        """The memory of `out` as the accumulator's: its upper halves, or all of it in fp32."""
        return out.view(torch.int16) if self.split else out

    def finish(
        self, row0: int, rows: int, *, stats: tuple[Tensor, ...] | None = None,
        u: Tensor | None = None, dh: Tensor | None = None, lo: Tensor | None = None,
    ) -> None:  # fmt: skip
        """log p and logsumexp from stats (ref, sum, logp, lse); u or dh from the accumulator."""
        none, w = self.label_z, self.w
        ref, total, logp, lse = stats or (none,) * 4
        out = u if u is not None else dh
        with on_device(w):
            _linear_logprob_finish_kernel[(rows,)](
                self.order, self.count, self.labels, self.label_z, ref, total, w,
                none if out is None else self.halves(out), none if lo is None else lo, logp, lse,
                none if out is None else out,
                self.softcap, self.inv_temperature,
                row0, self.V, self.H, w.stride(0), w.stride(1), 0 if out is None else out.stride(0),
                STATS=stats is not None, NEED_U=u is not None, NEED_DH=dh is not None,
                SPLIT=self.split, **FINISH_CONFIG,
            )  # fmt: skip


def linear_logprob_fwd(
    h: Tensor, w: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int,
    softcap: float, temperature: float, need_u: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(log p [M] fp32, logsumexp [M] fp32, u [M, H] or empty), zeros for ignored rows.

    h [M, H] and w [V, H] share fp32, bf16 or fp16, any strides; labels int64 [M]; bias [V]. An h
    whose rows, a w of which neither rows nor columns lie in one piece are copied.
    softcap 0 is none. H, V ≥ 1.
    """
    (M, H), V = h.shape, w.shape[0]
    logp, lse = (torch.empty(M, dtype=torch.float32, device=h.device) for _ in range(2))
    u = torch.empty((M, H) if need_u else 0, dtype=h.dtype, device=h.device)
    if M == 0:
        return logp, lse, u
    call = _Problem(h, w, labels, bias, ignore_index, softcap, temperature)
    h, w = call.h, call.w
    cfg = linear_logprob_fwd_config(M, H, V, arch_of(h.device), **call.config)
    n = cfg["logits"]["BLOCK_N"]
    if not need_u:
        tiles = triton.cdiv(V, n)
        top, total = call.new(tiles, M), call.new(tiles, M)
        call.logits(cfg["logits"], 0, M, 0, V, top=top, total=total)
        ref, sums = call.new(M), call.new(M)
        with on_device(h):
            _linear_logprob_merge_kernel[(triton.cdiv(M, MERGE_CONFIG["BLOCK_M"]),)](
                top, total, ref, sums, M, tiles, top.stride(0), **MERGE_CONFIG
            )
        call.finish(0, M, stats=(ref, sums, logp, lse))
        return logp, lse, u

    tma = cfg["tma"]
    if tma is not None and fits_tma(h, w, bias, softcap, tma["logits"]):
        cfg = tma
    rows, columns, n = cfg["rows"], cfg["columns"], cfg["sum"]["TILE"]
    p = call.new(rows, columns, dtype=h.dtype)
    lo = call.new(rows, H, dtype=torch.int16) if call.split else call.label_z
    top, total = call.new(columns // n, rows), call.new(columns // n, rows)
    by_tma = ByTma(h, w, p, cfg["logits"], cfg["sum"]) if cfg is tma else None
    rest = (call.order, call.count)
    running = [call.new(2, rows), call.new(2, rows)]  # reference and sum: read one, write the other
    for row0 in range(0, M, rows):
        size = min(rows, M - row0)
        running[0][0].fill_(NEVER.value)
        running[0][1].zero_()
        for i, v0 in enumerate(range(0, V, columns)):
            width = min(columns, V - v0)
            (ref, sums), (next_ref, next_sums) = running
            where = (row0, size, v0, width)
            state = (ref, sums, next_ref, next_sums, top, total)
            tiles = triton.cdiv(width, n)
            if by_tma is not None:
                more = (ref, top, total, call.inv_temperature, _jump(h.dtype))
                by_tma.logits(*rest, call.labels, call.label_z, where, *more)
                by_tma.add_product(*rest, u, lo, where, i == 0, state, tiles)
            else:
                call.logits(cfg["logits"], *where, top=top, total=total, ref=ref, p=p)
                call.add_product(cfg["sum"], p, u, lo, *where, i == 0, state, tiles)
            running.reverse()
        call.finish(row0, size, stats=(*running[0], logp, lse), u=u, lo=lo)
    return logp, lse, u


def linear_logprob_bwd(
    g: Tensor, h: Tensor, w: Tensor, labels: Tensor, bias: Tensor | None, lse: Tensor,
    ignore_index: int, softcap: float, temperature: float, need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dh [M, H], dw [V, H], dbias [V]) in h's dtype, each empty where not needed."""
    need_h, need_w, need_bias = need
    (M, H), V = h.shape, w.shape[0]

    def gradient(size: tuple[int, ...], needed: bool) -> Tensor:
        make = torch.empty if M > 0 else torch.zeros
        return make(size if needed else 0, dtype=h.dtype, device=h.device)

    dh, dw, dbias = gradient((M, H), need_h), gradient((V, H), need_w), gradient((V,), need_bias)
    if M == 0:
        return dh, dw, dbias
    call = _Problem(h, w, labels, bias, ignore_index, softcap, temperature)
    h = call.h
    cfg = linear_logprob_bwd_config(M, H, V, arch_of(h.device), **call.config)
    columns, g = cfg["columns"], g.contiguous()
    dz = call.new(M, columns, dtype=h.dtype)
    lo = call.new(M, H, dtype=torch.int16) if need_h and call.split else call.label_z
    blocks = triton.cdiv(M, cfg["logits"]["BLOCK_M"])
    for v0 in range(0, V, columns):
        width = min(columns, V - v0)
        # Zeros, for the row blocks that have nothing to do write nothing.
        part = torch.zeros(blocks, width, device=h.device) if need_bias else None
        call.logits(cfg["logits"], 0, M, v0, width, p=dz, lse=lse, g=g, dbias=part)
        if need_h:
            call.add_product(cfg["sum"], dz, dh, lo, 0, M, v0, width, v0 == 0)
        if need_w:
            out, tile = dw[v0 : v0 + width], cfg["dw"]
            grid = (triton.cdiv(width, tile["BLOCK_M"]) * triton.cdiv(H, tile["BLOCK_N"]),)
            with on_device(h):
                _linear_logprob_dw_kernel[grid](
                    dz, h, call.order, call.count, out, width, H,
                    dz.stride(0), h.stride(0), h.stride(1), out.stride(0), **tile,
                )  # fmt: skip
        if need_bias:
            dbias[v0 : v0 + width] = ordered_sum(part, h.dtype, 1.0)
    if need_h:
        call.finish(0, M, dh=dh, lo=lo)
    return dh, dw, dbias
