"""Frozen base weights in 4 and 8 bits, as `ops.lora_linear` takes them for w [N, K].

NF4 (Dettmers et al. 2023, "QLoRA", §3 and appendix E), in the layout of bitsandbytes: along the
flattened weight, element 2j is the high nibble of byte j and element 2j + 1 the low one;

    w[e] = CODE[nibble(e)] · absmax[e // block]

Double quantisation stores absmax itself in 8 bits: absmax[i] = book[q[i]] · absmax2[i // 256] +
offset. FP8: w[n, k] = data[n, k] · scale[n] with float8_e4m3fn, or one scale for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpeft.ops.quantised_cpu import native_rows, readable, slabs

# Quantiles of a normal distribution, symmetric about an exact zero (QLoRA, appendix E).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK2 = 256  # blocks that share an absmax2
MAX_CHUNK_BYTES = 4 << 20  # of W that are ever dequantised at once on a CPU
_E4M3_MAX = 448.0


class QuantisedWeight:
    """What both kinds share. Frozen: never a gradient."""

    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def parts(self) -> list[Tensor]:
        """Its tensors, from which `from_parts` makes it again."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """Its tensors as they were given."""
        return self.parts()

    @property
    def layout(self) -> list[int]:
        """What its tensors do not say: [N, K, block_size], the last 0 for FP8."""
        raise NotImplementedError

    @staticmethod
    def from_parts(parts: list[Tensor], layout: list[int]) -> QuantisedWeight:
        """The inverse of `parts` and `layout`."""
        n, k, size = layout
        if size == 0:
            return FP8Weight(parts[0].view(torch.float8_e4m3fn), parts[1])
        packed, absmax, *double = parts
        return NF4Weight(packed, absmax, (n, k), size, *double)

    def to(self, device: torch.device | str) -> QuantisedWeight:
        """On another device."""
        return self.from_parts([t.to(device) for t in self.parts()], self.layout)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """w[first:last] in fp32, then `dtype`; in C++ where that can read it."""
        made = native_rows if readable(*self.tensors()) else type(self).aten_rows
        return made(self, first, last, dtype)

    def aten_rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """`rows` in plain torch: its specification."""
        raise NotImplementedError

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of w [N, K]."""
        return self.rows(0, self.shape[0], dtype)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows, w[rows]) from first to last, at most MAX_CHUNK_BYTES (or one row) at a time."""
        n, k = self.shape
        step = max(1, MAX_CHUNK_BYTES // max(1, k * dtype.itemsize))
        for first in range(0, n, step):
            at = slice(first, min(first + step, n))
            yield at, self.rows(at.start, at.stop, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K] -> x Wᵀ + bias [M, N], some rows of W at a time."""
        y = x.new_empty(x.shape[0], self.shape[0])
        quick = readable(x, *self.tensors())
        made = slabs(self, x.dtype, MAX_CHUNK_BYTES, False) if quick else self.chunks(x.dtype)
        for at, w in made:
            if bias is None:
                torch.mm(x, w.t(), out=y[:, at])
            else:
                torch.addmm(bias[at], x, w.t(), out=y[:, at])
            del w  # before the next is made
        return y

    def mm(self, dy: Tensor) -> Tensor:
        """dy [M, N] -> dy W [M, K], some columns of W at a time, so that each sum is one product's;
        without C++ some rows, summed in fp32 at least."""
        if readable(dy, *self.tensors()):
            dx = dy.new_empty(dy.shape[0], self.shape[1])
            for at, w in slabs(self, dy.dtype, MAX_CHUNK_BYTES, True):
                torch.mm(dy, w, out=dx[:, at])
            return dx
        wide = torch.promote_types(dy.dtype, torch.float32)
        dx = dy.new_zeros(dy.shape[0], self.shape[1], dtype=wide)
        for at, w in self.chunks(wide):
            dx.addmm_(dy[:, at].to(wide), w)
            del w
        return dx.to(dy.dtype)


def _expect(name: str, t: Tensor, dtype: torch.dtype, numel: int, why: str) -> None:
    if not isinstance(t, Tensor) or t.dtype != dtype:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected {dtype}, got {got}")
    if t.numel() != numel:
        raise ValueError(f"{name}: expected {numel} elements ({why}), got {t.numel()}")


def _expect_shape(shape: tuple[int, int]) -> None:
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"w: expected a shape (N, K), got {tuple(shape)}")


def _expect_block(size: int) -> None:
    if not isinstance(size, int) or not 64 <= size <= 4096 or size & (size - 1):
        raise ValueError(f"block_size: expected a power of two from 64 to 4096, got {size}")


def _expect_one_device(weight: QuantisedWeight) -> None:
    found = {str(t.device) for t in weight.tensors()}
    if len(found) > 1:
        raise ValueError(f"w: expected its tensors on one device, got {sorted(found)}")


@dataclass(frozen=True, eq=False)
class NF4Weight(QuantisedWeight):
    """w [N, K] as 4-bit codes; K even. absmax fp32, or uint8 with book, absmax2 and offset.

    packed uint8 [N·K/2]; absmax [⌈N·K/block_size⌉]; book fp32 [256]; absmax2 fp32
    [⌈blocks/256⌉]; offset fp32, one element. block_size: a power of two, 64…4096.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    block_size: int = 64
    book: Tensor | None = None
    absmax2: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        _expect_shape(self.shape)
        (n, k), size = self.shape, self.block_size
        if k % 2:
            raise ValueError(f"w: expected an even K (two codes a byte), got {k}")
        _expect_block(size)
        blocks = -(-n * k // size)
        _expect("packed", self.packed, torch.uint8, n * k // 2, f"N·K/2 of {(n, k)}")
        dtype = torch.uint8 if self.double else torch.float32
        _expect("absmax", self.absmax, dtype, blocks, f"blocks of {size} in {n * k}")
        if self.double:
            for name in ("book", "absmax2", "offset"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name}: expected a tensor beside absmax2, got None")
            _expect("book", self.book, torch.float32, 256, "one a code")
            _expect("absmax2", self.absmax2, torch.float32, -(-blocks // BLOCK2), "256 blocks each")
            _expect("offset", self.offset, torch.float32, 1, "the mean of absmax")
        _expect_one_device(self)

    @property
    def double(self) -> bool:
        """Whether absmax is quantised too."""
        return self.absmax2 is not None

    def parts(self) -> list[Tensor]:
        parts = [self.packed, self.absmax]
        return [*parts, self.book, self.absmax2, self.offset] if self.double else parts

    @property
    def layout(self) -> list[int]:
        return [*self.shape, self.block_size]

    @classmethod
    def quantise(cls, w: Tensor, block_size: int = 64, double: bool = False) -> NF4Weight:
        """w [N, K] -> the nearest code of each w / absmax of its block.

        double: absmax less its mean, in blocks of 256, to the nearest of 256 evenly spaced values.
        """
        if w.ndim != 2 or not w.is_floating_point():
            raise ValueError(f"w: expected floating [N, K], got {w.dtype} {tuple(w.shape)}")
        _expect_block(block_size)
        code = torch.tensor(NF4_CODE, device=w.device)
        if w.shape[1] % 2:
            raise ValueError(f"w: expected an even K (two codes a byte), got {w.shape[1]}")
        flat = w.detach().float().reshape(-1)
        blocks = _blocked(flat, block_size)
        absmax = blocks.abs().amax(1)
        scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        nibbles = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8)
        pairs = nibbles.reshape(-1)[: flat.numel()].view(-1, 2)
        packed, shape = pairs[:, 0] << 4 | pairs[:, 1], (w.shape[0], w.shape[1])
        if not double:
            return cls(packed, absmax, shape, block_size)
        offset, book = absmax.mean().reshape(1), torch.linspace(-1, 1, 256, device=w.device)
        rest = _blocked(absmax - offset, BLOCK2)
        absmax2 = rest.abs().amax(1)
        scaled = rest / absmax2.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        q = torch.bucketize(scaled, (book[1:] + book[:-1]) / 2).to(torch.uint8)
        q = q.reshape(-1)[: absmax.numel()]
        return cls(packed, q, shape, block_size, book, absmax2, offset)

    @classmethod
    def from_bitsandbytes(cls, param: Tensor) -> NF4Weight:
        """The tensors of a `bitsandbytes.nn.Params4bit` of type "nf4", none copied."""
        state = getattr(param, "quant_state", None)
        if state is None:
            raise TypeError(f"param: expected a quantised Params4bit, got {type(param).__name__}")
        if state.quant_type != "nf4":
            raise ValueError(f"param: expected quant_type 'nf4', got {state.quant_type!r}")
        packed, shape = param.detach().reshape(-1), tuple(state.shape)
        if not state.nested:
            return cls(packed, state.absmax.reshape(-1), shape, state.blocksize)
        inner = state.state2
        if inner.blocksize != BLOCK2:
            raise ValueError(f"param: expected absmax in blocks of 256, got {inner.blocksize}")
        return cls(
            packed, state.absmax.reshape(-1), shape, state.blocksize,
            inner.code, inner.absmax, state.offset.reshape(1),
        )  # fmt: skip

    def block_scales(self, first: int, last: int) -> Tensor:
        """absmax[first:last] in fp32."""
        q = self.absmax[first:last]
        if not self.double:
            return q
        low, high = first // BLOCK2, -(-last // BLOCK2)
        coarse = self.absmax2.reshape(-1)[low:high].repeat_interleave(BLOCK2)
        coarse = coarse[first - low * BLOCK2 :][: last - first]
        return self.book.index_select(0, q.reshape(-1).int()) * coarse + self.offset

    def aten_rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        k, size, total = self.shape[1], self.block_size, self.shape[0] * self.shape[1]
        start, stop = first * k, last * k
        if start == stop:
            return torch.empty(last - first, k, dtype=dtype, device=self.device)
        low, high = start // size, -(-stop // size)  # whole blocks, of which the ends are cut off
        codes = self.packed.reshape(-1)[low * size // 2 : min(high * size, total) // 2]
        code = torch.tensor(NF4_CODE, device=self.device)
        pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1)  # a byte's two,
        pairs = pairs.view(torch.int64).view(-1)  # as one number: rows of two are slow to select
        w = pairs.index_select(0, codes.int()).view(torch.float32)
        absmax = self.block_scales(low, high).unsqueeze(1)
        if w.numel() == absmax.numel() * size:
            w.view(-1, size).mul_(absmax)
        else:  # the last block is a part of one
            w.mul_(absmax.expand(-1, size).reshape(-1)[: w.numel()])
        return w[start - low * size :][: stop - start].view(-1, k).to(dtype)


def _blocked(flat: Tensor, size: int) -> Tensor:
    """[blocks, size], zeros after the end."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


@dataclass(frozen=True, eq=False)
class FP8Weight(QuantisedWeight):
    """w [N, K] as data float8_e4m3fn [N, K] · scale, fp32 of one element or [N]."""

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.data, Tensor) or self.data.ndim != 2:
            raise ValueError("data: expected float8_e4m3fn [N, K], got no matrix")
        n, k = self.data.shape
        _expect("data", self.data, torch.float8_e4m3fn, n * k, "N·K")
        numel = 1 if isinstance(self.scale, Tensor) and self.scale.numel() == 1 else n
        _expect("scale", self.scale, torch.float32, numel, "one, or one a row")
        _expect_one_device(self)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return tuple(self.data.shape)  # type: ignore[return-value]

    def parts(self) -> list[Tensor]:
        return [self.data.view(torch.uint8), self.scale]  # bytes: few ops know the other

    def tensors(self) -> list[Tensor]:
        return [self.data, self.scale]

    @property
    def layout(self) -> list[int]:
        return [*self.shape, 0]

    @classmethod
    def quantise(cls, w: Tensor, per_row: bool = True) -> FP8Weight:
        """The largest magnitude, of a row or of all, becomes 448."""
        if w.ndim != 2 or not w.is_floating_point():
            raise ValueError(f"w: expected floating [N, K], got {w.dtype} {tuple(w.shape)}")
        w = w.detach().float()
        flat = w if per_row else w.reshape(1, -1)
        largest = flat.abs().amax(1) if flat.numel() else w.new_zeros(len(flat))
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny * _E4M3_MAX) / _E4M3_MAX
        return cls((w / scale.view(-1, 1)).to(torch.float8_e4m3fn), scale)

    def aten_rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        scale = self.scale.reshape(-1)
        scale = scale if scale.numel() == 1 else scale[first:last]
        codes = self.data[first:last].view(torch.uint8)
        table = torch.arange(256, dtype=torch.uint8, device=self.device)
        table = table.view(torch.float8_e4m3fn).float()  # a tenth of the time of .float() on all
        w = table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return w.mul_(scale.view(-1, 1)).to(dtype)
