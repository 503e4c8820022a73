"""Writes what README.md says of measurements from the committed files of bench/results.

    python -m fusedpeft.bench.readme [--check] [--root DIR]

Of README.md only what lies between `<!-- measured:begin -->` and `<!-- measured:end -->` is
replaced: a line for each op. Beside each device's files go README.md with its tables and ratios.svg
with their picture. --check changes nothing and exits with 1 where they are not what the files say.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from fusedpeft.bench.chart import Line, ratios_svg
from fusedpeft.bench.ledger import Result, ledger, load_results
from fusedpeft.bench.record import checkout
from fusedpeft.errors import InputError

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
OURS = "fusedpeft"
CHART = "ratios.svg"
# Ours in another way, or with less to do: nobody to be compared with.
NO_PEERS = ("accelerated", "fusedpeft + loss", "paged", "no prefix", "sdpa")
LISTED = 48  # cases a device and op; the others are summed up in one line


def _cases(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict]]:
    """(case, dtype) -> impl -> row, in the file's order, where ours is among them."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["case"], row["dtype"]), {})[row["impl"]] = row
    return {key: impls for key, impls in found.items() if OURS in impls}


def _ratio(row: dict | None) -> str:
    return "-" if row is None or row["ratio"] is None else f"{row['ratio']:.2f}"


def _contestants(cases: dict[tuple[str, str], dict[str, dict]]) -> tuple[str, list[str]]:
    """(the floor, the peers), from the case that has the most of them; the floor's ratio is 1."""
    most = max(cases.values(), key=len)
    floor = next(n for n in reversed(most) if most[n]["ratio"] == 1.0 and n != OURS)
    return floor, [name for name in most if name not in (OURS, floor)]


def _table(op: str, rows: list[dict]) -> list[str]:
    cases = _cases(rows)
    floor, peers = _contestants(cases)
    full = [key for key, impls in cases.items() if floor in impls][:LISTED]
    heads = ["dtype", "µs", f"× {floor}", *(f"{p} × {floor}" for p in peers), "% of ceiling"]
    lines = [f"| {op} | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for key in full:
        impls = cases[key]
        ours = impls[OURS]
        cells = [*key, f"{ours['median_us']:.1f}", f"**{_ratio(ours)}**"]
        cells += [_ratio(impls.get(p)) for p in peers] + [f"{ours['pct_of_ceiling']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    rest = {k: v[OURS] for k, v in cases.items() if k not in full and v[OURS]["ratio"] is not None}
    if rest:
        ratios = [row["ratio"] for row in rest.values()]
        worst = max(rest, key=lambda k: rest[k]["ratio"])
        lines += [
            "",
            f"{len(rest)} further shapes of {op}: median {statistics.median(ratios):.2f} "
            f"× {floor}, worst {max(ratios):.2f} × ({worst[0]}, {worst[1]}).",
        ]
    return lines


def _about(result: Result) -> str:
    env = result.environment
    versions = ", ".join(
        f"{name} {env['versions'][name]}"
        for name in ("torch", "triton", "peft")
        if env["versions"].get(name)
    )
    driver = f", driver {env['driver']}" if env["driver"] else ""
    return f"**{env['device']}**{driver}, {versions}; commit {env['commit']}, {env['date']}"


def _groups(rows: list[dict]) -> dict[tuple[str, str], dict[tuple[str, str], dict[str, dict]]]:
    """(kind, dtype) -> cases; the kind is a case's first word where that is no size."""
    found: dict = {}
    for (case, dtype), impls in _cases(rows).items():
        word = case.partition(" ")[0]
        found.setdefault((word if word.isalpha() else "", dtype), {})[case, dtype] = impls
    return found


def _ratios(cases: dict[tuple[str, str], dict[str, dict]], name: str) -> list[float]:
    rows = (impls.get(name) for impls in cases.values())
    return [row["ratio"] for row in rows if row is not None and row["ratio"] is not None]


def _summary(result: Result) -> tuple[list[str], list[Line]]:
    """A line of the table, and of the picture, for each op, kind and dtype."""
    table, picture = [], []
    for rows in result.rows.values():
        op, (floor, peers) = rows[0]["op"], _contestants(_cases(rows))
        for (kind, dtype), cases in _groups(rows).items():
            ours = _ratios(cases, OURS)
            if not ours:
                continue
            names = (p for p in peers if p not in NO_PEERS)
            others = {p: got for p in names if (got := _ratios(cases, p))}
            medians = {p: statistics.median(got) for p, got in others.items()}
            best = min(medians, key=medians.get) if medians else None
            cells = [
                f"{op} {kind}".strip(), dtype, floor, str(len(ours)),
                f"**{statistics.median(ours):.2f}**", f"{min(ours):.2f}–{max(ours):.2f}",
                "-" if best is None else f"{best} {medians[best]:.2f}",
            ]  # fmt: skip
            table.append(f"| {' | '.join(cells)} |")
            label = " ".join(filter(None, (op, kind, dtype)))
            picture.append(Line(label, ours, [r for got in others.values() for r in got]))
    return table, picture


def _device(result: Result) -> list[str]:
    folder = f"bench/results/{result.path.name}"
    heads = ("op", "dtype", "×", "shapes", "median", "from–to", "the best other")
    return [
        f"{_about(result)}: [every shape]({folder}/README.md)", "",
        f"![Ratios by op]({folder}/{CHART})", "",
        f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *_summary(result)[0], "",
    ]  # fmt: skip


def pages(root: Path) -> dict[Path, str]:
    """What lies beside each device's files: its tables, and their picture."""
    found = {}
    for result in load_results(root):
        if not result.rows:
            continue
        lines = [f"# {result.environment['device']}", "", _about(result), ""]
        lines += [
            "Written by `python -m fusedpeft.bench.readme`.",
            "",
            f"![Ratios by op]({CHART})",
            "",
        ]
        for rows in result.rows.values():
            lines += [*_table(rows[0]["op"], rows), ""]
        found[result.path / "README.md"] = "\n".join(lines).strip() + "\n"
        title = f"Ratios on {result.environment['device']}"
        found[result.path / CHART] = ratios_svg(title, _summary(result)[1])
    return found


def measured(root: Path) -> str:
    """The text between the markers: a table a device, then what a GPU has verified."""
    results = [r for r in load_results(root) if r.rows]
    lines: list[str] = []
    for result in results:
        lines += _device(result)
    if not results:
        lines += ["No measurement is committed yet.", ""]
    states: dict[str, list[str]] = {}
    for e in ledger(root):
        states.setdefault(e.text, []).append(f"`{e.kernel}`")
    lines += [f"GPU kernels, {text}: {', '.join(names)}." for text, names in states.items()]
    return "\n".join(lines).strip()


def rewrite(text: str, table: str) -> str:
    """`text` with what lies between the markers replaced."""
    head, begin, tail = text.partition(BEGIN)
    _, end, after = tail.partition(END)
    if not begin or not end:
        raise InputError(f"README.md: expected the markers {BEGIN} and {END}, one after the other")
    return f"{head}{BEGIN}\n{table}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if it is out of date")
    parser.add_argument("--root", type=Path, help="source checkout")
    args = parser.parse_args(argv)
    root = checkout(args.root)
    path = root / "README.md"
    if not path.is_file():
        raise InputError(f"{path}: expected a README with the markers, found no file")
    wanted = {path: rewrite(path.read_text(), measured(root))} | pages(root)
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text() != text]
    for page in stale:
        if args.check:
            print(f"{page.relative_to(root)}: out of date; run python -m fusedpeft.bench.readme")
        else:
            page.write_text(wanted[page])
    return int(args.check and bool(stale))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
