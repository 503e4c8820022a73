"""What `ops.lora_linear` asks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedpeft.ops.arguments import PLAIN, check_number, check_probability, check_triton, is_plain
from fusedpeft.ops.lora_cpu import MAX_DECODE_TOKENS, native_ok
from fusedpeft.ops.multi_lora_cuda import check_call, one_ok
from fusedpeft.ops.native import DTYPE_CODES
from fusedpeft.ops.quantised import QuantisedWeight
from fusedpeft.ops.slots import RANK_STEP

IMPLS = ("native", "cuda", "aten", "triton")


def is_sound(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Whether `check` would pass CPU tensors, in 1 us instead of 3: each decoded token asks it.

    False may also mean that it takes the long list to know.
    """
    try:
        (n, k), (r, ak), (bn, br) = w.shape, a.shape, b.shape
    except ValueError:
        return False
    return (
        x.ndim > 0
        and x.shape[-1] == k == ak
        and bn == n
        and br == r > 0
        and x.dtype in DTYPE_CODES
        and x.dtype == w.dtype
        and a.dtype in DTYPE_CODES
        and a.dtype == b.dtype
        and (x.is_cpu and w.is_cpu and a.is_cpu and b.is_cpu)
        and (
            bias is None
            or (type(bias) in PLAIN and bias.shape == (n,) and bias.dtype == x.dtype)
            and bias.is_cpu
        )
    )


def check(x, w, a, b, bias, scale, dropout_p, magnitude, impl) -> None:
    for name, t, dims in (
        ("x", x, "[*, K]"),
        ("w", w, "[N, K]"),
        ("a", a, "[R, K]"),
        ("b", b, "[N, R]"),
    ):  # noqa: E501
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor {dims}, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (as x), got {t.device}")
        if t.ndim != 2 and (t is not x or t.ndim < 1):
            raise ValueError(f"{name}: expected {dims}, got shape {tuple(t.shape)}")
    (n, k), r = w.shape, a.shape[0]
    if x.shape[-1] != k:
        raise ValueError(
            f"x: expected last dim K = {k} (w is {tuple(w.shape)}), got {tuple(x.shape)}"
        )  # noqa: E501
    if r < 1:
        raise ValueError("a: expected rank R >= 1, got 0")
    if a.shape[1] != k:
        raise ValueError(f"a: expected [R, {k}], got {tuple(a.shape)}")
    if b.shape != (n, r):
        raise ValueError(f"b: expected [N, R] = {(n, r)}, got {tuple(b.shape)}")
    if w.dtype != x.dtype:
        raise TypeError(f"w: expected dtype {x.dtype} (as x), got {w.dtype}; cast one, or autocast")
    if b.dtype != a.dtype:
        raise TypeError(f"b: expected dtype {a.dtype} (as a), got {b.dtype}")
    for name, t in (("bias", bias), ("magnitude", magnitude)):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor [{n}] or None, got {type(t).__name__}")
        if t is not None and (t.shape != (n,) or t.device != x.device):
            raise ValueError(
                f"{name}: expected [{n}] on {x.device}, got {list(t.shape)} on {t.device}"
            )
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias: expected dtype {x.dtype} (as x), got {bias.dtype}")
    check_number("scale", scale)
    check_probability("dropout_p", dropout_p)
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS} or None, got {impl!r}")
    if impl == "triton":
        check_triton(x)


def check_quantised(x, w: QuantisedWeight, a, b, bias, scale, dropout_p, magnitude, impl) -> None:
    """`check`, with a matrix that takes no memory in the place of w."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor [*, K], got {type(x).__name__}")
    if w.device != x.device:
        raise ValueError(f"w: expected device {x.device} (as x), got {w.device}")
    if impl == "cuda":
        raise ValueError(
            "impl: expected 'native', 'aten', 'triton' or None for a quantised w, got 'cuda'"
        )
    check(x, x.new_empty(()).expand(w.shape), a, b, bias, scale, dropout_p, magnitude, impl)


def decode_ok(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the C++ kernel of x's device is there and takes what `check` has passed."""
    return one_ok(w, a, b) if x.is_cuda else native_ok(x, w, a, b)


def check_decode(impl: str, x: Tensor, w: Tensor, a: Tensor, b: Tensor, grad: bool, p: float):
    """What impl="native" and impl="cuda" ask beyond `check`. x [M, K]."""
    if grad or p > 0.0:
        raise ValueError(
            f"impl={impl!r}: expected no gradients and no dropout; use 'aten' to train"
        )
    if impl == "cuda":
        check_call(x, x.shape[0])
        if x.dtype not in DTYPE_CODES or not one_ok(w, a, b):
            raise ValueError(
                "impl='cuda': expected fp32, bf16 or fp16 with unit inner strides, b contiguous, R "
                f"a multiple of {RANK_STEP} and adapters of the same dtype or fp32, got {x.dtype}/"
                f"{a.dtype}, R {a.shape[0]}, strides {w.stride()}, {a.stride()}, {b.stride()}"
            )
        return
    if x.shape[0] > MAX_DECODE_TOKENS:
        raise ValueError(f"impl='native': expected <= {MAX_DECODE_TOKENS} rows, got {x.shape[0]}")
    if x.device.type != "cpu" or not native_ok(x, w, a, b):
        raise ValueError(
            "impl='native': expected CPU tensors of fp32, bf16 or fp16 with unit inner strides and "
            f"adapters of the same dtype or fp32, got {x.dtype}/{a.dtype} on {x.device}"
        )


def check_multi(x, ws, as_, bs, scales, biases, dropout_p, magnitudes, impl) -> None:
    lists = dict(ws=ws, as_=as_, bs=bs, scales=scales, biases=biases, magnitudes=magnitudes)
    for name, values in lists.items():
        if not isinstance(values, Sequence):
            raise TypeError(f"{name}: expected a list or tuple, got {type(values).__name__}")
        if len(values) != len(ws):
            raise ValueError(f"{name}: expected {len(ws)} entries (as ws), got {len(values)}")
    if not any(a is not None for a in as_):
        raise ValueError("as_: expected at least one adapter, got none")
    dtype = next((a.dtype for a in as_ if isinstance(a, Tensor)), None)
    usual = dropout_p == 0.0 and impl is None and is_plain((x, *ws, *as_, *bs))
    for i, (w, a, b, scale, bias, m) in enumerate(zip(*lists.values(), strict=True)):
        plain = usual and m is None and type(scale) is float and scale - scale == 0.0
        if plain and is_sound(x, w, a, b, bias) and a.dtype == dtype:
            continue
        try:
            if (a is None) != (b is None) or (a is None and m is not None):
                raise ValueError("a, b: expected both or neither, and no magnitude without them")
            if a is None and isinstance(w, Tensor) and w.ndim == 2:  # the linear alone
                a = w.new_empty(1, w.shape[1], dtype=dtype)
                b = w.new_empty(w.shape[0], 1, dtype=dtype)
            check(x, w, a, b, bias, scale, dropout_p, m, impl)
            if a.dtype != dtype:
                raise TypeError(f"a: expected dtype {dtype} (as the others), got {a.dtype}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"projection {i}: {error}") from None
