"""Makes pyext/ops/lora_choice.json: measured times that `ops.lora_choice.choose` goes by.

    python -m fusedpeft.bench.lora_choice [--root DIR]

Reads the committed bench/results/<device>/lora.json of every CUDA run and takes each case in which
the Triton kernels and cuBLAS with an accumulating pass were both timed. A row: device, commit,
arch, kind ("fwd" or "bwd"), m, n, k, r, elem_bytes, triton_us, cublas_us.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from fusedpeft.bench.ledger import Result, load_results
from fusedpeft.bench.lora_impls import ATEN, TRITON
from fusedpeft.bench.record import checkout
from fusedpeft.errors import InputError

_CASE = re.compile(r"(decode|fwd|bwd) (\d+)->(\d+) M(\d+) R(\d+)")
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def arch_of(environment: dict) -> str:
    """As kernels/device.py has it, from what the run wrote down."""
    if environment["versions"]["cuda"] is None:
        return "gfx942"
    return "sm_90" if environment["capability"].split(".")[0] in ("9", "10") else "sm_80"


def rows_of(results: list[Result]) -> list[dict]:
    """The rows of the table, from every CUDA run that timed both."""
    found = []
    for result in results:
        if not result.environment["cuda"]:
            continue
        cases: dict[tuple[str, str], dict[str, dict]] = {}
        for row in result.rows.get("lora", []):
            cases.setdefault((row["case"], row["dtype"]), {})[row["impl"]] = row
        for (case, dtype), impls in cases.items():
            parts = _CASE.fullmatch(case)
            if parts is None or not {TRITON, ATEN} <= impls.keys():
                continue
            k, n, m, r = (int(v) for v in parts.groups()[1:])
            row = {name: impls[TRITON][name] for name in ("device", "commit")}
            row |= dict(arch=arch_of(result.environment), kind=parts[1].replace("decode", "fwd"))
            row |= dict(m=m, n=n, k=k, r=r, elem_bytes=_BYTES[dtype])
            row |= dict(
                triton_us=impls[TRITON]["median_us"], cublas_us=impls[ATEN]["median_us"]
            )  # fmt: skip
            found.append(row)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="source checkout")
    root = checkout(parser.parse_args(argv).root)
    rows = rows_of(load_results(root))
    if not rows:
        raise InputError(
            f"{root}/bench/results: expected a CUDA run whose lora.json has '{TRITON}' and "
            f"'{ATEN}', got none; make one with bench/gpu.sh on a GPU"
        )
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = root / "pyext" / "ops" / "lora_choice.json"
    path.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    print(f"{path}: {len(rows)} measured cases")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
