"""Runs the cases of one op: ceilings first, then case by case, the file rewritten after each."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path

import torch

from fusedpeft.bench import record, report
from fusedpeft.bench.ceilings import measure
from fusedpeft.bench.harness import run_case
from fusedpeft.errors import InputError

BUSY = 0.5  # load average of a machine that is not quiet
OPS = {
    "lora": "fusedpeft.bench.bench_lora",
    "lora_multi": "fusedpeft.bench.bench_lora_multi",
    "lora_quantised": "fusedpeft.bench.bench_lora_quantised",
    "adapter": "fusedpeft.bench.bench_adapter",
    "adapter_decode": "fusedpeft.bench.bench_adapter_decode",
    "prefix_attention": "fusedpeft.bench.bench_prefix_attention",
    "prefix_decode": "fusedpeft.bench.bench_prefix_decode",
    "linear_logprob": "fusedpeft.bench.bench_linear_logprob",
    "soft_prompt": "fusedpeft.bench.bench_soft_prompt",
    "multi_lora": "fusedpeft.bench.bench_multi_lora",
    "multi_lora_model": "fusedpeft.bench.bench_multi_lora_model",
    "methods": "fusedpeft.bench.bench_methods",
    "pro_step": "fusedpeft.bench.bench_pro_step",
}


def pick_device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def run_op(
    op: str,
    device: str = "cpu",
    json: Path | None = None,
    *,
    full: bool = False,
    case: str | None = None,
    impls: list[str] | None = None,
    seconds: float = 1.0,
    budget: float | None = None,
    warm: bool = False,
    save: bool = False,
) -> list[dict]:
    """Benches one op and returns its rows.

    case: only labels that contain every one of its words; impls: only these contestants (the floor
    is always among them); seconds: of rounds a case; budget: no case starts after so many seconds;
    warm: one copy of the weights, so that a CPU's cache may hold them; save: the rows and the
    environment go to bench/results/<device>/, to be committed.
    Raises InputError for an unknown op, case or contestant, BenchMismatch for a wrong result.
    """
    if op not in OPS:
        raise InputError(f"bench: expected one of {', '.join(OPS)}, got {op!r}")
    module = importlib.import_module(OPS[op])
    dev = pick_device(device)
    words = (case or "").split()
    chosen = [
        s for s in module.specs(dev, full) if set(words) <= {*s.label.split()} or case == s.label
    ]
    if not chosen:
        known = ", ".join(s.label for s in module.specs(dev, full)[:3])
        raise InputError(f"--case: nothing matches {case!r}; labels look like: {known}")
    if impls and (unknown := set(impls) - set(module.ALL)):
        raise InputError(
            f"--impl: expected some of {', '.join(module.ALL)}, got {', '.join(sorted(unknown))}"
        )
    only = (*impls, module.FLOOR) if impls else None

    if save:
        root = record.checkout(None)
        out = record.results_dir(root, dev)
        record.write_environment(out, dev, root)
        json = out / f"{op}.json"
    start, load = time.perf_counter(), os.getloadavg()[0]
    ceilings = measure(dev, sorted({s.dtype for s in chosen}, key=str))
    rates = ", ".join(
        f"{report.DTYPE_NAMES[d]} {v:.3f} TFLOP/s" for d, v in ceilings.tflop_per_s.items()
    )
    print(f"{report.device_name(dev)}, torch {torch.__version__}")
    print(f"ceilings of this run: copy {ceilings.gb_per_s:.1f} GB/s; product {rates}")
    if load > BUSY:
        print(f"load average {load:.1f} before the start: others compute here, trust no figure")
    commit = report.commit()
    rows: list[dict] = []
    said: set[str] = set()
    left: list[str] = []
    for spec in chosen:
        if budget is not None and time.perf_counter() - start > budget:
            left.append(spec.label)
            continue
        made = module.build(spec, dev, only, warm)
        for name, why in made.missing.items():
            if name not in said:
                print(f"{name}: {why}")
                said.add(name)
        new = report.rows_of(made, run_case(made, seconds=seconds), ceilings, commit)
        report.print_rows(new)
        rows += new
        if json is not None:
            report.write_json(json, rows)
    if left:
        print(f"not run, the budget of {budget:.0f} s was spent: {len(left)} cases, from {left[0]}")
    return rows
