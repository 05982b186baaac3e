"""Command line of the GPU run; see the package."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from bench.gpu.kernel_cache import KernelCache
from bench.gpu.ledger import Ledger
from bench.gpu.part import Kind, PartResult, PartSpec
from bench.gpu.parts import ENVIRONMENT, FIRST, PARTS, after_first
from bench.gpu.report import line_of, passed, record, shared_of, text
from bench.gpu.supervisor import Supervisor, worker_environment

_ROOT = Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / "bench/results"
_BUDGET_S, _FIRST_BUDGET_S = 450.0, 300.0


def main(arguments: Sequence[str] | None = None, parts: Sequence[PartSpec] = PARTS) -> int:
    """Run the parts, print, write; returns 1 when a check failed or the run was ended."""
    names = ", ".join(spec.name for spec in parts)
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=f"Parts: {names}.")
    parser.add_argument("--dry-run", action="store_true", help="take every path without a GPU; no figures, no file")
    parser.add_argument(
        "--first",
        action="store_true",
        help="for a machine that is there for minutes: what is wanted most, then the rest",
    )
    parser.add_argument("--only", default="", help="these parts, separated by commas; the environment always runs")
    parser.add_argument(
        "--budget-s",
        type=float,
        help=f"seconds ({_BUDGET_S:.0f}, with --first {_FIRST_BUDGET_S:.0f}); parts share them",
    )
    parser.add_argument("--out", type=Path, help="write the JSON there instead of to bench/results")
    parser.add_argument(
        "--kernels", type=Path, help="folder of triton-cache-*.tar.gz of an earlier run, to compile less"
    )
    args = parser.parse_args(arguments)
    groups: list[Sequence[PartSpec]] = [parts]
    if args.first:
        # A dry run without --first takes the paths of the rest, and of what both have.
        only_first = [spec for spec in FIRST if spec not in PARTS or spec == ENVIRONMENT]
        groups = [only_first] if args.dry_run else [FIRST, after_first(parts)]
    groups = _choose(parser, groups, args.only)
    budget_s = args.budget_s or (_FIRST_BUDGET_S if args.first else _BUDGET_S)

    start = time.monotonic()
    # What is found is kept there while the run goes on: on a borrowed machine $OUT is what comes back.
    folder = Path(os.environ.get("OUT") or _ROOT / "build/gpu")
    ledger = Ledger(folder / "findings.jsonl", dry_run=args.dry_run)
    cache = _kernel_cache(folder, args.kernels, dry_run=args.dry_run)

    def listen(part: str, kind: Kind, value: dict[str, Any]) -> None:
        ledger.take(part, kind, value)
        print(line_of(part, kind, value, dry_run=args.dry_run), file=sys.stderr, flush=True)
        if kind == "end":
            cache.save()

    supervisor = Supervisor(dry_run=args.dry_run, budget_s=budget_s, listen=listen)
    interrupted = False
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for group in groups:
            supervisor.run(group)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
    cache.save()
    ledger.close()
    results, seconds = supervisor.results, time.monotonic() - start
    content = record(results, dry_run=args.dry_run, budget_s=budget_s, seconds=seconds)
    report = text(results, dry_run=args.dry_run, seconds=seconds)
    (folder / "report.txt").write_text(report + "\n")
    print(report)
    path = args.out or (None if args.dry_run else _default_path(folder, results))
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {path}")
    return 0 if passed(results) and not interrupted else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the run as Ctrl-C does, with a report of what there is."""
    raise KeyboardInterrupt


def _kernel_cache(folder: Path, earlier: Path | None, *, dry_run: bool) -> KernelCache:
    """Return the cache that workers compile into."""
    cache = KernelCache(Path(worker_environment(dry_run=dry_run)["TRITON_CACHE_DIR"]), folder)
    if earlier is not None:
        print(f"{cache.restore(earlier)} compiled kernels restored from {earlier}", file=sys.stderr)
    return cache


def _choose(
    parser: argparse.ArgumentParser, groups: Sequence[Sequence[PartSpec]], only: str
) -> list[Sequence[PartSpec]]:
    if not only:
        return list(groups)
    names = [spec.name for group in groups for spec in group]
    wanted = set(only.split(","))
    for name in sorted(wanted - set(names)):
        parser.error(f"--only: there is no part {name!r}; parts are {', '.join(names)}")
    # The ceilings that others use are measured in the same run, always.
    return [[spec for spec in group if spec.name in wanted or spec == ENVIRONMENT] for group in groups]


def _default_path(folder: Path, results: Sequence[PartResult]) -> Path | None:
    """Return where the record goes: to $OUT where that is set, else among the results of the repository."""
    name = shared_of(results).get("device", {}).get("name")
    if name is None:
        return None  # nothing was measured
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    return (folder if "OUT" in os.environ else _RESULTS) / f"{datetime.now(UTC):%Y-%m-%d}-{slug}.json"


if __name__ == "__main__":
    sys.exit(main())
