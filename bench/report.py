"""Rows of a bench: made from timings, printed as a table, written as JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import torch

from fusedpeft.bench.ceilings import Ceilings
from fusedpeft.bench.harness import Case, Timing

ROW_KEYS = (
    "op", "case", "impl", "dtype", "device", "median_us", "p20_us", "p80_us", "gb_per_s",
    "tflop_per_s", "pct_of_ceiling", "peak_bytes", "error", "commit", "ratio",
)  # fmt: skip
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def repo_root() -> Path | None:
    """The source checkout this package was imported from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "setup.py").is_file() and (root / "csrc").is_dir() else None


def commit(root: Path | None = None) -> str:
    """Short commit of the checkout, `+` where tracked sources differ from it.

    FUSEDPEFT_COMMIT overrides it (a copy of the tree without its history); else "unknown".
    """
    if value := os.environ.get("FUSEDPEFT_COMMIT"):
        return value
    root = root or repo_root()
    if root is None or not (root / ".git").exists():
        return "unknown"

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    sources = ("kernels", "csrc", "pyext", "bench", "setup.py", ":!bench/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    head = git("rev-parse", "--short", "HEAD")
    return f"{head}+" if head and changed else head or "unknown"


def device_name(device: torch.device) -> str:
    """Model name of the GPU or of the processor, with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "cpu"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model} ({torch.get_num_threads()} threads)"


def rows_of(case: Case, timings: list[Timing], ceilings: Ceilings, commit_: str) -> list[dict]:
    """One row an implementation, with exactly ROW_KEYS; `ratio` is against the case's floor."""
    impls = {i.name: i for i in case.impls}
    floor = {t.name: t.median_us for t in timings}.get(case.floor)
    device = device_name(case.device)
    rows = []
    for t in timings:
        impl = impls[t.name]
        percent = ceilings.percent(impl.flops, impl.moved_bytes, case.dtype, t.median_us)
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "impl": t.name,
                "dtype": DTYPE_NAMES[case.dtype],
                "device": device,
                "median_us": round(t.median_us, 3),
                "p20_us": round(t.p20_us, 3),
                "p80_us": round(t.p80_us, 3),
                "gb_per_s": round(impl.moved_bytes / t.median_us / 1e3, 3),
                "tflop_per_s": round(impl.flops / t.median_us / 1e6, 5),
                "pct_of_ceiling": round(percent, 2),
                "peak_bytes": t.peak_bytes,
                "error": t.error,
                "commit": commit_,
                "ratio": None if floor is None else round(t.median_us / floor, 4),
            }
        )
    return rows


def write_json(path: Path, value: object) -> None:
    """Whole or not at all: written beside the target, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def print_table(title: str, header: list[str], lines: list[list[str]]) -> None:
    """With rich where it is installed, else aligned plain text (a bare machine has no rich)."""
    if importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for i, name in enumerate(header):
            table.add_column(Text(name), justify="left" if i == 0 else "right", no_wrap=True)
        for line in lines:
            table.add_row(*map(Text, line))
        console = Console()
        if not console.is_terminal:
            console.width = 200  # a log or a pipe: never cut a figure off
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(table)
        return
    width = [max(len(row[i]) for row in [header, *lines]) for i in range(len(header))]
    print(title)
    for row in [header, *lines]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip())


def print_rows(rows: list[dict]) -> None:
    """A table a case."""
    cases: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    for (op, case, dtype), group in cases.items():
        lines = [
            [
                r["impl"],
                f"{r['median_us']:.1f}",
                f"{r['p20_us']:.1f}-{r['p80_us']:.1f}",
                "-" if r["ratio"] is None else f"{r['ratio']:.3f}",
                f"{r['gb_per_s']:.1f}",
                f"{r['tflop_per_s']:.3f}",
                f"{r['pct_of_ceiling']:.0f}",
                f"{r['peak_bytes'] / 2**20:.2f}",
                f"{r['error']:.1e}",
            ]
            for r in group
        ]
        print_table(
            f"{op}  {case}  {dtype}",
            ["impl", "µs", "p20-p80", "× floor", "GB/s", "TFLOP/s", "% ceil", "peak MiB", "error"],
            lines,
        )
