"""Compile every Triton configuration that the heuristics can choose, without a GPU, and judge it.

    python -m fusedpeft.bench.aot [--op lora ...] [--arch sm_90 ...] [--json FILE] [--check]
    python -m fusedpeft.bench.aot --op lora --save     all of it, to the committed table
    python -m fusedpeft.bench.aot --every 8 --check    a sample, against the committed tables

A row: op, kernel, arch, configuration, registers a thread, spills (stack bytes on NVIDIA, vector
registers and scratch bytes on AMD), shared memory, blocks that fit on one SM or CU, whether the
tensor cores of Hopper are used (`wgmma` in the PTX), and TMA where the kernel takes descriptors.
--check exits with 1 on a spill, on more shared memory than the chip has, on descriptors without
TMA, or on a 16-bit product of at least 64 rows that should use wgmma (`Spec.wgmma`) and does not on
sm_90. bf16, bf16 with fp32 adapters, fp32; ranks that are a multiple of 16 and ranks that are not
("any rank"); other sizes divisible by 16 and unit inner strides, as models have and the launchers
see to (kernels/aligned.py, or rows of their own, "_odd"; tests/kernels/test_launches.py).

The committed tables, bench/results/aot/OP.json, name the code that they were compiled from, so that
a change to a kernel or its tiles asks for --save again: twice, as the oldest Triton that we support
allocates registers otherwise and has tables of its own in aot/triton-3.6. --check compares what it
compiled with those of its version.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
from pathlib import Path

import triton

from fusedpeft.bench.record import checkout
from fusedpeft.bench.report import repo_root
from fusedpeft.bench.sources import code_hash
from fusedpeft.kernels.aot import OPS, SHARED_LIMIT, configs, measure, specs
from fusedpeft.kernels.device import ARCHS

OLDEST = "triton-3.6"


def problems(row: dict) -> list[str]:
    """What --check objects to."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spilled")
    if row["shared_bytes"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"{row['shared_bytes']} > {SHARED_LIMIT[row['arch']]} shared bytes")
    expected = specs(row["op"])[row["kernel"]].wgmma and row["config"]["BLOCK_M"] >= 64
    if row["arch"] == "sm_90" and row["elem_bytes"] == 2 and expected and not row["wgmma"]:
        found.append("no wgmma")
    if not row.get("tma", True):
        found.append("no TMA")
    if row["blocks_per_sm"] < 1:
        found.append("does not fit an SM")
    return found


def markdown(rows: list[dict]) -> str:
    """The table that people read."""
    head = "op | kernel | arch | dtype | flags | config | regs | spills | shared KiB | blocks/SM"
    head += " | wgmma"
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for r in rows:
        on = {
            **r["flags"],
            "hold": r["config"].get("HOLD"),
            "any rank": not r.get("wide_rank", True),
        }
        flags = " ".join(k.lower() for k, v in on.items() if v) or "-"
        sizes = {k: v for k, v in r["config"].items() if k.startswith("BLOCK")}
        config = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in sizes.items())
        config += f" w{r['config']['num_warps']} s{r['config']['num_stages']}"
        dtype = "bf16" if r["elem_bytes"] == 2 else "fp32"
        dtype += "+fp32" if r["elem_bytes"] < r.get("adapter_bytes", 0) else ""
        cells = (
            *(r["op"], r["kernel"], r["arch"], dtype, flags, config, r["registers"], r["spills"]),
            *(f"{r['shared_bytes'] / 1024:.1f}", r["blocks_per_sm"], "yes" if r["wgmma"] else "-"),
        )
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines)


def committed(op: str) -> Path:
    """The table of this version of Triton."""
    folder = checkout(None) / "bench" / "results" / "aot"
    old = f"triton-{triton.__version__}".startswith(OLDEST + ".")
    return (folder / OLDEST if old else folder) / f"{op}.json"


def write(path: Path, rows: list[dict], more: dict) -> None:
    """{"triton": version, …, "rows": […]}, a row a line: readable diffs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"triton": triton.__version__, **more})[:-1]
    lines = ",\n".join(json.dumps(r) for r in rows)
    path.write_text(f'{head}, "rows": [\n{lines}\n]}}\n')


def changed(op: str, rows: list[dict]) -> list[dict]:
    """Rows of `op` that the committed table, made by this version of Triton, has otherwise."""
    if repo_root() is None or not committed(op).is_file():
        return []
    table = json.loads(committed(op).read_text())
    if table["triton"] != triton.__version__:
        return []
    return [r for r in rows if r["op"] == op and r not in table["rows"]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS, help="default: all")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--save", action="store_true", help="write bench/results/aot/OP.json")
    parser.add_argument("--check", action="store_true", help="exit with 1 on any problem")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th row")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter cannot compile; unset it")
    if args.save and (args.arch or args.every > 1):
        parser.error("--save: expected whole tables, got --arch or --every; leave them out")
    ops = args.op or OPS
    jobs = [
        (op, arch, row) for op in ops for arch in args.arch or ARCHS for row in configs(op, arch)
    ][:: args.every]
    spawn = multiprocessing.get_context("spawn")  # LLVM's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        rows = list(pool.map(measure, jobs))
    print(markdown(rows))
    if args.json:
        write(args.json, rows, {})
    for op in ops if args.save else ():
        found = [r for r in rows if r["op"] == op]
        write(committed(op), found, {"code": code_hash(op, checkout(None))})
    bad = [(r, p) for r in rows if (p := problems(r))]
    if args.check:
        bad += [(r, ["not as in the committed table"]) for op in ops for r in changed(op, rows)]
    for r, p in bad:
        print(f"{r['op']} {r['kernel']} {r['arch']} {r['flags']} {r['config']}: {', '.join(p)}")
    print(f"{len(rows)} configurations, {len(bad)} with problems", file=sys.stderr)
    return 1 if args.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
