"""Command line of the GPU run; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.gpu.part import PartResult, PartSpec
from bench.gpu.parts import ENVIRONMENT, PARTS
from bench.gpu.report import passed, record, shared_of, text
from bench.gpu.supervisor import Supervisor

_RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: Sequence[str] | None = None, parts: Sequence[PartSpec] = PARTS) -> int:
    """Run the parts, print, write; returns 1 when a check failed."""
    names = ", ".join(spec.name for spec in parts)
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=f"Parts: {names}.")
    parser.add_argument("--dry-run", action="store_true", help="take every path without a GPU; no figures, no file")
    parser.add_argument("--only", default="", help="these parts, separated by commas; the environment always runs")
    parser.add_argument("--budget-s", type=float, default=450, help="seconds; what does not fit is left out")
    parser.add_argument("--out", type=Path, help="write the JSON there instead of to bench/results")
    args = parser.parse_args(arguments)
    chosen = _choose(parser, parts, args.only)

    start = time.monotonic()
    supervisor = Supervisor(dry_run=args.dry_run, budget_s=args.budget_s)
    results = supervisor.run(chosen, on_result=_progress)
    seconds = time.monotonic() - start
    content = record(results, dry_run=args.dry_run, budget_s=args.budget_s, seconds=seconds)
    path = args.out or (None if args.dry_run else _default_path(results))
    print(text(results, dry_run=args.dry_run, seconds=seconds))
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {path}")
    return 0 if passed(results) else 1


def _choose(parser: argparse.ArgumentParser, parts: Sequence[PartSpec], only: str) -> list[PartSpec]:
    if not only:
        return list(parts)
    wanted = set(only.split(","))
    for name in sorted(wanted - {spec.name for spec in parts}):
        parser.error(f"--only: there is no part {name!r}; parts are {', '.join(spec.name for spec in parts)}")
    # The ceilings that others use are measured in the same run, always.
    return [spec for spec in parts if spec.name in wanted or spec == ENVIRONMENT]


def _progress(result: PartResult) -> None:
    print(f"{result.name}: {result.state} in {result.seconds:.0f} s", file=sys.stderr, flush=True)


def _default_path(results: Sequence[PartResult]) -> Path | None:
    name = shared_of(results).get("device", {}).get("name")
    if name is None:
        return None  # nothing was measured
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    return _RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{slug}.json"


if __name__ == "__main__":
    sys.exit(main())
