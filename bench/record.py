"""Writes down where a run took place and how its tests ended, for the ledger.

    python -m fusedpeft.bench.record --out DIR --device cuda [--junit FILE]

DIR/environment.json: device, driver, versions, commit, date and the hash of every kernel's source
at that time. DIR/tests.json: one entry a test. Beside them lie the rows of each bench, <op>.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import torch

from fusedpeft.bench import report, sources
from fusedpeft.errors import InputError

PACKAGES = ("fusedpeft", "torch", "triton", "transformers", "peft")
ENVIRONMENT, TESTS = "environment.json", "tests.json"


def version(package: str) -> str | None:
    if not importlib.util.find_spec(package):
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # importable without being installed
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def _first_line(command: list[str]) -> str | None:
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def nvcc_version() -> str | None:
    if not shutil.which("nvcc"):
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found.group(1) if found else None


def environment(device: torch.device, root: Path) -> dict:
    """What environment.json holds."""
    cuda = device.type == "cuda"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": report.device_name(device),
        "cuda": cuda,
        "capability": capability,
        "driver": _first_line(driver) if cuda else None,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "torch": str(torch.__version__),  # with the build, which the package's may not name
            "cuda": torch.version.cuda,
            "nvcc": nvcc_version(),
        },
        "commit": report.commit(root),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "sources": sources.hashes(root),
    }


def tests_of(junit: Path) -> list[dict]:
    """[{file, test, outcome, seconds, message}] from a junit file that pytest wrote."""
    try:
        tree = xml.parse(junit)
    except (OSError, xml.ParseError) as error:
        raise InputError(f"{junit}: expected a junit file of pytest, got {error}") from None
    tests = []
    for case in tree.iter("testcase"):
        parts = case.get("classname", "").split(".")
        outcome, message = "passed", ""
        for kind, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if (child := case.find(kind)) is not None:
                outcome, message = name, (child.get("message") or "").split("\n")[0][:200]
                break
        tests.append(
            {
                "file": next((p for p in parts if p.startswith("test_")), parts[-1]),
                "test": case.get("name"),
                "outcome": outcome,
                "seconds": float(case.get("time", 0)),
                "message": message,
            }
        )
    return tests


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def results_dir(root: Path, device: torch.device) -> Path:
    return root / "bench" / "results" / slug(report.device_name(device))


def checkout(root: Path | None) -> Path:
    """The source checkout to read, given or found; InputError in an installed wheel."""
    root = root or report.repo_root()
    if root is None or not (root / "kernels").is_dir():
        raise InputError(
            "expected a source checkout (kernels/, csrc/, bench/results/), got "
            f"{root or 'an installed wheel, which carries none of them'}; "
            "run it in a clone, or pass --root DIR"
        )
    return root.resolve()


def write_environment(out: Path, device: torch.device, root: Path) -> None:
    report.write_json(out / ENVIRONMENT, environment(device, root))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--junit", type=Path, help="result file of pytest: becomes tests.json")
    parser.add_argument("--root", type=Path, help="source checkout")
    args = parser.parse_args(argv)
    root, device = checkout(args.root), torch.device(args.device)
    out = args.out or results_dir(root, device)
    if args.junit is None:
        write_environment(out, device, root)
    else:
        tests = tests_of(args.junit)
        report.write_json(out / TESTS, tests)
        counts = {o: sum(t["outcome"] == o for t in tests) for o in ("passed", "failed", "skipped")}
        print(", ".join(f"{n} {o}" for o, n in counts.items()))
        return int(counts["passed"] == 0)  # a run that skipped everything has shown nothing
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
