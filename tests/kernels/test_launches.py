"""Whatever the sizes, strides and addresses: every launch is one that the tables were compiled for.

No GPU and no interpreter: the launchers run on a CPU, and each kernel is a spy that keeps what it
was called with and computes nothing. Numbers are compared in *_interpret_checks.py.
"""

import functools
import importlib
import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's kernels have no signature", allow_module_level=True)

import triton

from fusedpeft import ops
from fusedpeft.kernels import adapter, lora, lora_multi, lora_quantised, multi_lora
from fusedpeft.kernels.aligned import aligned, cut
from fusedpeft.kernels.aot import configs, specs
from fusedpeft.kernels.device import ARCHS, SMS
from fusedpeft.ops.slots import LoRASlots

SPECS = {op: specs(op) for op in ("lora", "lora_quantised", "multi_lora", "adapter")}
MODULES = "sums lora lora_bwd lora_gemm lora_multi lora_quantised multi_lora adapter"
# Compiled for multiples of 16 and launched with any, at no cost: rows (LOG.md), what is read as one
# number, and how many elements are summed.
FREE = {"M", "numel", "seed_ptr", "offset_ptr", "scale_ptr"}


@functools.cache
def rows_of(arch: str) -> dict:
    """kernel -> [(spec, row)] of the tables."""
    found: dict = {}
    for op in SPECS:
        for row in configs(op, arch):
            spec = SPECS[op][row["kernel"]]
            found.setdefault(spec.fn, []).append((spec, row))
    return found


class Launches:
    """What was launched on one architecture: [(kernel, its arguments by name)]."""

    def __init__(self, arch: str, monkeypatch) -> None:
        self.arch, self.seen, self.rows = arch, [], rows_of(arch)
        for name in MODULES.split():
            module = importlib.import_module(f"fusedpeft.kernels.{name}")
            for key, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction) and key.endswith("_kernel"):
                    monkeypatch.setattr(module, key, self.spy(value))
            monkeypatch.setattr(module, "arch_of", lambda device: arch, raising=False)
        monkeypatch.setitem(SMS, arch, 4)  # large tiles, and TMA, for sizes that are small

    def spy(self, fn):
        keep = self.seen.append

        class Spy:
            def __getitem__(self, grid):
                return lambda *args, **more: keep((fn, dict(zip(fn.arg_names, args)) | more))  # noqa: B905

        return Spy()

    def check(self) -> list[str]:
        """Each is a row of a table, for arguments as that row takes them for granted."""
        names = [fn.__name__ for fn, _ in self.seen]
        assert names
        for fn, given in self.seen:
            rows = [pair for pair in self.rows[fn] if is_row(given, pair[1])]
            tile = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
            assert rows, f"{fn.__name__} on {self.arch}: no row for {tile}"
            best = min((faults(given, *pair) for pair in rows), key=len)
            assert not best, f"{fn.__name__} on {self.arch}: {best}"
        self.seen.clear()
        return names


def is_row(given: dict, row: dict) -> bool:
    flags = {k: v for k, v in row["flags"].items() if k != "ACT"}  # one stands for the others
    return all(given[k] == v for k, v in (flags | row["config"]).items())


def faults(given: dict, spec, row: dict) -> list[str]:
    """The arguments that are not as the kernel was compiled for."""
    unread = set() if row["flags"].get("FUSE_S", True) else {"a_ptr", "stride_ar", "stride_ak"}
    found = [name for name in spec.unit.split() if given[name] != 1 and name not in unread]
    free = {*spec.ragged.split(), *spec.unit.split(), *spec.tiles, *FREE, *unread}
    if not row.get("wide_rank", True):  # S beside S of other ranks begins anywhere
        free |= {*spec.rank.split(), "s_ptr", "stride_sm"}
    for name in set(spec.fn.arg_names) - free - row["flags"].keys() - row["config"].keys():
        value = given[name].data_ptr() if isinstance(given[name], torch.Tensor) else given[name]
        if not isinstance(value, float) and value % 16:
            found.append(f"{name} {value}")
    return found


@pytest.fixture(params=ARCHS)
def launches(request, monkeypatch):
    return Launches(request.param, monkeypatch)


LAYOUTS = {
    "plain": lambda t: t,
    "late": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
    "wide": lambda t: torch.cat((t, t[..., :1]), -1)[..., :-1],
    "turned": lambda t: t.t().contiguous().t() if t.ndim == 2 else t,
    "gaps": lambda t: torch.stack((t, t), -1)[..., 0],
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
sizes = pytest.mark.parametrize("n, k", [(64, 48), (320, 50), (35, 304), (35, 50)])
CASES = [  # M, R, dropout, bytes of an element of x and W, of A and B
    (9, 8, 0.0, 2, 2), (37, 12, 0.25, 2, 2), (301, 16, 0.0, 2, 4), (300, 40, 0.1, 2, 2),
    (301, 16, 0.25, 4, 4),
]  # fmt: skip
DTYPES = {2: torch.bfloat16, 4: torch.float32}
SEED = torch.tensor([3])


def maker(layout: str, size: int):
    return lambda *shape: LAYOUTS[layout](torch.randn(shape).to(DTYPES[size]))


def as_parameters(grads, leaves) -> None:
    """What the fake kernels promise."""
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype and grad.is_contiguous()


@layouts
@sizes
def test_lora(launches, n, k, layout):
    for m, r, p, size, adapter_size in CASES:
        base, own = maker(layout, size), maker(layout, adapter_size)
        x, w, a, b, bias, dy = base(m, k), base(n, k), own(r, k), own(n, r), base(n), base(m, n)
        y, s = lora.lora_fwd(x, w, a, b, 1.5, bias, p, SEED)
        as_parameters((y, s), (dy, own(m, r)))
        grads = lora.lora_bwd(dy, x, w, a, b, s, 1.5, p, SEED, *[True] * 5)
        as_parameters(grads, (x, w, a, b, bias))
        names = launches.check()
        # Of sizes that TMA cannot address, too: forward's y, or dx.
        tma = (n, r) == (320, 40) or (k, r, p) == (304, 16, 0.0)
        tma &= launches.arch == "sm_90"
        assert tma == ("_lora_gemm_tma_kernel" in names)


@layouts
@sizes
def test_lora_multi(launches, n, k, layout):
    widths = (n, 16, n)
    for m, r, p, size, adapter_size in CASES:
        ranks = (r, 0, 16)
        base, own = maker(layout, size), maker(layout, adapter_size)
        x, ws, biases = base(m, k), [base(n, k) for n in widths], [base(n) for n in widths]
        as_, bs = [own(r, k) for r in ranks], [own(n, r) for n, r in zip(widths, ranks)]  # noqa: B905
        dys = [base(m, n) for n in widths]
        ys, s = lora_multi.lora_multi_fwd(x, ws, as_, bs, (1.5,) * 3, biases, p, SEED)
        as_parameters((*ys, s), (*dys, own(m, sum(ranks))))
        dx, *lists = lora_multi.lora_multi_bwd(
            dys, x, ws, as_, bs, s, (1.5,) * 3, p, SEED, True, [[True] * 3] * 4
        )
        as_parameters((dx, *sum(lists, [])), (x, *ws, *as_, *bs, *biases))
        launches.check()


@layouts
@sizes
@pytest.mark.parametrize("kind", ["nf4", "nf4_double", "fp8"])
def test_lora_quantised(launches, kind, n, k, layout):
    weight = torch.randn(n, k)
    if kind == "fp8":
        weight, how = ops.FP8Weight.quantise(weight), (1, ())
    else:
        weight = ops.NF4Weight.quantise(weight, double=kind == "nf4_double")
        how = (weight.layout[2].bit_length() - 1, (0.0,) * 16)
    # Codes and scales may begin anywhere as well.
    parts = [t.view(torch.uint8) if t.element_size() == 1 else t for t in weight.parts()]
    parts = [LAYOUTS["late"](t) if layout == "late" else t for t in parts]
    for m, r, p, size, adapter_size in CASES:
        base, own = maker(layout, size), maker(layout, adapter_size)
        x, a, b, bias, dy = base(m, k), own(r, k), own(n, r), base(n), base(m, n)
        y, s = lora_quantised.lora_quantised_fwd(x, parts, *how, n, a, b, 1.5, bias, p, SEED)
        as_parameters((y, s), (dy, torch.empty(m, r)))
        grads = lora_quantised.lora_quantised_bwd(
            dy, x, parts, *how, a, b, s, 1.5, p, SEED, True, True, True, True
        )
        as_parameters(grads, (x, a, b, bias))
        launches.check()


@layouts
@pytest.mark.parametrize("k", [48, 50])
@pytest.mark.parametrize("widths", [(64, 32), (64, 35), (35,)])
def test_multi_lora(launches, widths, k, layout):
    for m, max_rank, size, pool_size in ((9, 8, 2, 2), (301, 24, 2, 4), (300, 64, 4, 4)):
        n, base = sum(widths), maker(layout, size)
        parts, own = len(widths), maker("late" if layout == "late" else "plain", pool_size)
        pool = LoRASlots(
            own(3, parts * max_rank, k), own(3, n * max_rank),
            torch.full((3, parts), 5, dtype=torch.int32), torch.ones(3, parts), widths,
        )  # fmt: skip
        slots = LAYOUTS[layout](torch.zeros(m, dtype=torch.int32))
        y = multi_lora.multi_lora_fwd(base(m, k), base(n, k), pool, slots, base(n))
        as_parameters((y,), (torch.empty(m, n, dtype=DTYPES[size]),))
        launches.check()


@layouts
@pytest.mark.parametrize("norm", ["", "layer_norm"])
@pytest.mark.parametrize("e", [12, 100, 300])
def test_adapter(launches, e, norm, layout):
    """d is a multiple of 16: the op sends others to ATen."""
    d = 80
    for m, _, p, size, adapter_size in CASES:
        base, own = maker(layout, size), maker(layout, adapter_size)
        x, residual, dy = base(m, d), base(m, d), base(m, d)
        weights = own(e, d), own(e), own(d, e), own(d)
        of_norm = (own(d), own(d)) if norm else (None, None)
        more = ("gelu", norm, 1e-5, 1.5, p, False)
        y, saved, stats = adapter.adapter_fwd(x, *weights, residual, *of_norm, SEED, *more)
        as_parameters((y, saved), (dy, own(m, e)))
        down_w, down_b, up_w, up_b = weights
        grads = adapter.adapter_bwd(
            dy, x, down_w, down_b, up_w, *of_norm, saved, stats, SEED,
            "gelu", norm, 1.5, p, False, [True] * 5 + [norm != ""] * 2,
        )  # fmt: skip
        as_parameters(grads[: 7 if norm else 5], (x, *weights, *(t for t in of_norm if norm)))
        launches.check()


def test_what_is_aligned_is_not_copied():
    t = torch.randn(37, 48)
    for view in (t, t[5:], torch.randn(9, 96)[:, 16:64], torch.randn(9, 12), torch.randn(48)):
        assert aligned(view) is view
    assert aligned(t, 1) is t and aligned(None, 0) is None and cut(t, 37, 48) is t


def test_what_is_copied_keeps_its_numbers_and_has_zeros_behind():
    t = torch.randn(35, 50)
    for name, layout in LAYOUTS.items():
        got = aligned(layout(t), 0, 1)
        assert got.shape == (48, 64) and got.is_contiguous(), name
        assert torch.equal(cut(got, 35, 50), t) and got.count_nonzero() == t.count_nonzero()
        view = layout(torch.randn(64, 48))
        assert torch.equal(aligned(view, 0, 1), view)
    assert aligned(t[:0], 1).shape == (0, 64) and aligned(torch.randn(5), 0).shape == (16,)
