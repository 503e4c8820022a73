"""What the norm of a bottleneck adapter costs beside its products: two kernels over the weights.

before: D' = D∘γ, g = Σ_j D'_ej, c + D β          after: dD, dγ, dβ from G = dPᵀ x̂ and dc
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["has_c", "has_nw", "has_nb"])
def _adapter_fold_kernel(
    w_ptr, c_ptr, nw_ptr, nb_ptr, out_ptr, g_ptr, fc_ptr, D, has_c, has_nw, has_nb,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of D: D' = D∘γ as the products take it, g its sum, and c + D β."""
    e = tl.program_id(0)
    row = e.to(tl.int64) * D
    at = tl.arange(0, BLOCK)
    g = tl.zeros((BLOCK,), dtype=tl.float32)
    beta = tl.zeros((BLOCK,), dtype=tl.float32)
    for n0 in range(0, D, BLOCK):
        cols = n0 + at
        ok = cols < D
        w = tl.load(w_ptr + row + cols, mask=ok, other=0.0).to(tl.float32)
        nb = tl.load(nb_ptr + cols, mask=ok & (has_nb != 0), other=0.0).to(tl.float32)
        nw = tl.load(nw_ptr + cols, mask=ok & (has_nw != 0), other=1.0).to(tl.float32)
        beta += w * nb
        low = (w * nw).to(out_ptr.dtype.element_ty)
        g += tl.where(ok, low.to(tl.float32), 0.0)  # of the rounded: μ g is what x D'ᵀ holds of μ
        tl.store(out_ptr + row + cols, low, mask=ok)
    c = tl.load(c_ptr + e, mask=has_c != 0, other=0.0).to(tl.float32)
    tl.store(g_ptr + e, tl.sum(g, 0))
    tl.store(fc_ptr + e, c + tl.sum(beta, 0))


@triton.jit(do_not_specialize=["parts", "has_nw", "has_nb", "need_dw", "need_nw", "need_nb"])
def _adapter_norm_grads_kernel(
    part_ptr, w_ptr, nw_ptr, nb_ptr, dc_ptr, dw_ptr, dnw_ptr, dnb_ptr,
    parts, D, E, has_nw, has_nb, need_dw, need_nw, need_nb,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """G = Σ_i part[i, E, D] in order; dD = γ∘G + dc βᵀ, dγ = Σ_e D_e∘G_e, dβ = Dᵀ dc."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < D
    nw = tl.load(nw_ptr + cols, mask=col_ok & (has_nw != 0), other=1.0).to(tl.float32)
    nb = tl.load(nb_ptr + cols, mask=col_ok & (has_nb != 0), other=0.0).to(tl.float32)
    dnw = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dnb = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for e0 in range(0, E, BLOCK_E):
        es = e0 + tl.arange(0, BLOCK_E)
        e_ok = es < E
        ok = e_ok[:, None] & col_ok[None, :]
        at = es.to(tl.int64)[:, None] * D + cols[None, :]
        g = tl.zeros((BLOCK_E, BLOCK_N), dtype=tl.float32)
        part_ptrs = part_ptr + at
        for _ in range(parts):
            g += tl.load(part_ptrs, mask=ok, other=0.0)
            part_ptrs += E * D
        w = tl.load(w_ptr + at, mask=ok, other=0.0).to(tl.float32)
        dc_ok = e_ok & (has_nb != 0)
        dc = tl.load(dc_ptr + es, mask=dc_ok, other=0.0)
        dnw += tl.sum(w * g, 0)
        dnb += tl.sum(w * dc[:, None], 0)
        dw = nw[None, :] * g + dc[:, None] * nb[None, :]
        tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty), mask=ok & (need_dw != 0))
    dtype: tl.constexpr = dnw_ptr.dtype.element_ty
    tl.store(dnw_ptr + cols, dnw.to(dtype), mask=col_ok & (need_nw != 0))
    tl.store(dnb_ptr + cols, dnb.to(dtype), mask=col_ok & (need_nb != 0))
