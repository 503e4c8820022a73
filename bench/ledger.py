"""The ledger: which GPU kernel has been proven on which GPU, in the form it has now.

A kernel is **verified** when, in some bench/results/<device>/ of a CUDA run, the tests that speak
for it passed (at least one, none failed) and the hash of its source, with all it includes, is still
the one written down there. If the source changed since, it is **unverified**; if it never passed,
**unverified (never run on a GPU)**; if its tests failed in the form it has now, **failed**.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fusedpeft.bench import report, sources
from fusedpeft.bench.record import ENVIRONMENT, TESTS, checkout
from fusedpeft.errors import InputError

VERIFIED, UNVERIFIED, FAILED = "verified", "unverified", "failed"


@dataclass(frozen=True)
class Result:
    """One bench/results/<device>/."""

    path: Path
    environment: dict
    tests: list[dict]
    rows: dict[str, list[dict]]  # file stem -> rows

    def outcome(self, kernel: str, root: Path) -> str | None:
        """passed, failed, or None where no test of it ran here."""
        files = {t["file"] for t in self.tests}
        files = {f for f in files if kernel in sources.covers(f.removeprefix("test_"), root)}
        mine = {t["outcome"] for t in self.tests if t["file"] in files}
        if "failed" in mine:
            return "failed"
        return "passed" if "passed" in mine else None

    def figures(self, kernel: str, root: Path) -> list[dict]:
        """The rows of our own implementation that this kernel had a part in."""
        return [
            row
            for stem, rows in self.rows.items()
            if kernel in sources.covers(stem, root) | sources.covers(f"{stem}_cuda", root)
            for row in rows
            if row["impl"] == "fusedpeft"
        ]


@dataclass(frozen=True)
class Entry:
    kernel: str
    hash: str
    state: str
    text: str  # the state in words
    runs: list[Result] = field(default_factory=list)  # GPU runs in which it passed


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: expected JSON, got {error}; make it again with bench/gpu.sh"
        ) from None


def load_results(root: Path) -> list[Result]:
    """Every folder of bench/results that says where it was made."""
    found = []
    for folder in sorted((root / "bench" / "results").glob("*/")):
        if not (folder / ENVIRONMENT).is_file():
            continue
        tests = _load(folder / TESTS) if (folder / TESTS).is_file() else []
        rows = {
            p.stem: data
            for p in sorted(folder.glob("*.json"))
            if p.name not in (ENVIRONMENT, TESTS)
            and isinstance(data := _load(p), list)
            and data
            and {"op", "impl", "median_us"} <= data[0].keys()
        }
        found.append(Result(folder, _load(folder / ENVIRONMENT), tests, rows))
    return found


def entry(kernel: str, now: str, results: list[Result], root: Path) -> Entry:
    """The state of one kernel whose source has the hash `now`."""
    gpu = [r for r in results if r.environment["cuda"]]
    passed = [r for r in gpu if r.outcome(kernel, root) == "passed"]
    same = [r for r in passed if r.environment["sources"].get(kernel) == now]
    failed = [
        r
        for r in gpu
        if r.outcome(kernel, root) == "failed" and r.environment["sources"].get(kernel) == now
    ]
    where = ", ".join(f"{r.environment['device']} at {r.environment['commit']}" for r in same)
    if failed:
        names = ", ".join(r.environment["device"] for r in failed)
        return Entry(kernel, now, FAILED, f"failed on {names}", passed)
    if same:
        return Entry(kernel, now, VERIFIED, f"verified on {where}", same)
    if passed:
        last = max(passed, key=lambda r: r.environment["date"]).environment
        text = f"unverified (changed since it passed at {last['commit']} on {last['device']})"
        return Entry(kernel, now, UNVERIFIED, text, passed)
    return Entry(kernel, now, UNVERIFIED, "unverified (never run on a GPU)")


def ledger(root: Path) -> list[Entry]:
    """One entry for each kernel file of the checkout."""
    results = load_results(root)
    return [entry(kernel, now, results, root) for kernel, now in sources.hashes(root).items()]


def print_ledger(root: Path | None = None) -> list[Entry]:
    """Prints each kernel's state, when and where it last passed, and what it measured there."""
    root = checkout(root)
    entries = ledger(root)
    lines = []
    for e in entries:
        last = max((r.environment for r in e.runs), key=lambda v: v["date"], default=None)
        lines.append([e.kernel, e.hash, e.text, last["date"] if last else "-"])
    report.print_table("Kernels on a GPU", ["kernel", "source", "state", "last passed"], lines)
    shown: set[Path] = set()
    for e in entries:
        for run in e.runs:
            if run.path in shown or not (rows := run.figures(e.kernel, root)):
                continue
            shown.add(run.path)
            env = run.environment
            stale = "" if e.state == VERIFIED else "; the source has changed since"
            report.print_table(
                f"{env['device']}, driver {env['driver']}, commit {env['commit']}{stale}",
                ["case", "dtype", "µs", "× floor", "% ceiling"],
                [
                    [
                        f"{r['op']} {r['case']}",
                        r["dtype"],
                        f"{r['median_us']:.1f}",
                        "-" if r["ratio"] is None else f"{r['ratio']:.3f}",
                        f"{r['pct_of_ceiling']:.0f}",
                    ]
                    for r in rows
                ],
            )
    counts = {s: sum(e.state == s for e in entries) for s in (VERIFIED, UNVERIFIED, FAILED)}
    print(", ".join(f"{n} {state}" for state, n in counts.items()))
    return entries
