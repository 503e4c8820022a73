"""`python -m fusedpeft.bench`: the bench without typer, for a bare machine.

python -m fusedpeft.bench lora --device cuda --json FILE
python -m fusedpeft.bench aot --arch sm_90 --check
python -m fusedpeft.bench --ledger
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.errors import InputError


def run_ledger(root: Path | None) -> int:
    from fusedpeft.bench.ledger import print_ledger

    print_ledger(root)
    return 0


def run_aot(arguments: list[str]) -> int:
    if not importlib.util.find_spec("triton"):
        raise InputError("bench aot: triton is not installed; pip install triton (Linux, x86-64)")
    from fusedpeft.bench import aot

    return aot.main(arguments)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["aot"]:
        return run_aot(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m fusedpeft.bench", epilog="aot: aot --help")
    parser.add_argument("op", nargs="?", help="lora, or aot")
    parser.add_argument("--ledger", action="store_true", help="which kernel passed on which GPU")
    parser.add_argument("--root", type=Path, help="source checkout that the ledger reads")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--full", action="store_true", help="every shape, not a slice")
    parser.add_argument("--case", help="only cases with these words, e.g. 'decode M4 bf16'")
    parser.add_argument("--impl", action="append", help="only this contestant and the floor")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed rounds a case")
    parser.add_argument("--budget", type=float, help="start no case after so many seconds")
    parser.add_argument("--warm", action="store_true", help="leave the weights in the cache")
    parser.add_argument("--save", action="store_true", help="write to bench/results/<device>/")
    args = parser.parse_args(argv)
    if args.ledger:
        return run_ledger(args.root)
    if args.op is None:
        parser.error("expected an op (lora), aot or --ledger")
    from fusedpeft.bench.run import run_op

    run_op(
        args.op, args.device, args.json, full=args.full, case=args.case, impls=args.impl,
        seconds=args.seconds, budget=args.budget, warm=args.warm, save=args.save,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
    except BenchMismatch as error:
        sys.exit(f"mismatch, nothing was timed: {error}")
