"""The table that ends the run, short enough to be read, and the record of everything."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from bench.gpu.ledger import plain
from bench.gpu.part import Check, Kind, PartResult

_NO_FIGURES = "dry run: no figures"
_MOST_FAILURES = 25
_ONLY_IN_JSON = {"alone_us", "cold", "form", "seconds"}  # columns that would make the table too wide to read


def record(results: Sequence[PartResult], *, dry_run: bool, budget_s: float, seconds: float) -> dict[str, Any]:
    """Return everything as plain values. Figures of a dry run are left out: they stand for nothing."""
    shared = shared_of(results)
    parts = [result.to_json() for result in results]
    for part in parts:
        del part["shared"]
        part["rows"] = [{key: plain(value, dry_run=dry_run) for key, value in row.items()} for row in part["rows"]]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dry_run": dry_run,
        "device": shared.get("device", {}),
        "versions": shared.get("versions", {}),
        "ceilings": {} if dry_run else shared.get("ceilings", {}),
        "budget_s": budget_s,
        "seconds": round(seconds, 1),
        "passed": passed(results),
        "parts": parts,
    }


def shared_of(results: Sequence[PartResult]) -> dict[str, Any]:
    """Return what parts shared."""
    known: dict[str, Any] = {}
    for result in results:
        known |= result.shared
    return known


def passed(results: Sequence[PartResult]) -> bool:
    """True if nothing failed; what was left out did not."""
    return all(result.state != "failed" for result in results)


def line_of(part: str, kind: Kind, value: dict[str, Any], *, dry_run: bool) -> str:
    """Return the line that a finding is, as it comes."""
    if kind == "row":
        words = ", ".join(f"{name} {_cell(name, item, dry_run)}" for name, item in value.items())
    elif kind == "check":
        words = _judged(Check(**value))
    elif kind == "begin":
        words = f"begins, with {value['seconds']:.0f} s"
    elif kind == "end":
        words = f"{value['state']} in {value['seconds']:.0f} s{'' if value['error'] is None else ': ' + value['error']}"
    elif kind == "note":
        words = value["text"]
    else:
        words = f"shares {', '.join(value)}"
    return f"{part}: {words}"[:300]


def text(results: Sequence[PartResult], *, dry_run: bool, seconds: float) -> str:
    """Return the report for people. What failed and how the targets stand comes last: a terminal keeps the end."""
    shared = shared_of(results)
    device, versions = shared.get("device", {}), shared.get("versions", {})
    title = f"{device.get('name', 'no device')}, " + ", ".join(f"{name} {value}" for name, value in versions.items())
    lines = [f" {_NO_FIGURES if dry_run else title} ".center(110, "=")]
    for result in results:
        lines += _table(result, dry_run)
    lines.append(f"{' Checks ':-^110}")
    for result in results:
        good = sum(check.passed is True for check in result.checks)
        unknown = sum(check.passed is None for check in result.checks)
        counts = f"{good} of {len(result.checks)} checks hold" + (f", {unknown} not judged" if unknown else "")
        lines.append(f"{result.name:<16}{result.state:<10}{result.seconds:>6.0f} s  {counts if result.checks else ''}")
        lines += [f"    {note}"[:200] for note in result.notes]
    targets = [check for result in results for check in result.checks if check.target]
    if targets:
        lines.append(f"{' Targets ':-^110}")
        lines += [_judged(check)[:200] for check in targets]
    failures = [
        f"FAILED {check.name}: {check.detail}"
        for result in results
        for check in result.checks
        if check.passed is False and not check.target
    ]
    failures += [f"FAILED {result.name}: {result.error.splitlines()[0]}" for result in results if result.error]
    if failures:
        lines.append(f"{' Failures ':-^110}")
        lines += [failure[:200] for failure in failures[:_MOST_FAILURES]]
    if len(failures) > _MOST_FAILURES:
        lines.append(f"and {len(failures) - _MOST_FAILURES} more: see the JSON")
    verdict = "passed" if passed(results) else "FAILED"
    lines.append(f" {verdict} in {seconds:.0f} s{f', {_NO_FIGURES}' if dry_run else ''} ".center(110, "="))
    return "\n".join(lines)


def _judged(check: Check) -> str:
    verdict = {True: "holds ", False: "FAILED", None: "not judged"}[check.passed]
    return f"{verdict} {check.name}{f': {check.detail}' if check.detail else ''}"


def _table(result: PartResult, dry_run: bool) -> list[str]:
    if not result.rows:
        return []
    columns = [column for column in result.rows[0] if column not in _ONLY_IN_JSON]
    cells = [[_cell(column, row.get(column), dry_run) for column in columns] for row in result.rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    rights = [any(isinstance(row.get(column), int | float) for row in result.rows) for column in columns]

    def line(values: Sequence[str]) -> str:
        aligned = (v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, rights, strict=True))
        return "  ".join(aligned).rstrip()

    return [f" {result.name} ".center(110, "-"), line(columns), *map(line, cells)]


def _cell(column: str, value: Any, dry_run: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if dry_run:
            return "-"
        if column == "ceiling":
            return f"{value:.0%}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
