"""Command line of the ahead-of-time check; see the package."""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import triton

from scalellm.kernels.aot.compiler import Report, compile_variant
from scalellm.kernels.aot.gate import read_baseline, violations, write_baseline
from scalellm.kernels.aot.recorder import record
from scalellm.kernels.spec import SERVED
from scalellm.kernels.tiles import default_tables

_SMS = (80, 90, 100)  # and those that an op has a table for
_BASELINE = Path(__file__).with_name(f"baseline-triton-{triton.__version__}.json")


def main() -> int:
    """Compile, print, compare."""
    parser = argparse.ArgumentParser(prog="python -m scalellm.kernels.aot")
    parser.add_argument("--write", action="store_true", help=f"make the result the new {_BASELINE.name}")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--cache", type=Path, default=Path("build/aot"), help="folder of earlier results")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")

    start = time.perf_counter()
    tasks = [
        (i, sm)
        for i, case in enumerate(SERVED)
        if args.only in case.name
        for sm in sorted({*_SMS, *default_tables(case.op)})
        if sm >= case.min_sm
    ]
    with ProcessPoolExecutor(args.jobs) as pool:
        results = pool.map(partial(_compile_case, cache=args.cache), tasks)
        reports = {(sm, name): report for found in results for (sm, name), report in found.items()}

    baseline = {} if args.write and not args.only else read_baseline(_BASELINE)
    failures = []
    for (sm, name), report in sorted(reports.items()):
        numbers = f"{report.registers:4} regs {report.stack:5} stack {report.shared:7} smem {report.wide:3} wide"
        ahead = " ".join(f"{loop.buffers}/{loop.in_flight}" for loop in report.loops)
        print(f"sm_{sm:<4}{name:76}{numbers}  {report.mma:8}{ahead}".rstrip())
        # Without a baseline for this version of Triton, only the limits that hold for any version are checked.
        failures += violations(sm, name, report, baseline.get(f"sm_{sm} {name}") if baseline else report)
    named = {f"sm_{sm} {name}": report for (sm, name), report in reports.items()}
    if not args.only:
        failures += [
            f"{name}: is in the baseline and no specification serves it" for name in baseline.keys() - named.keys()
        ]
    if not baseline and not args.write:
        print(f"there is no {_BASELINE.name}: nothing to compare with")
    print(f"{len(reports)} variants, {time.perf_counter() - start:.0f} s, triton {triton.__version__}")
    if args.write:
        write_baseline(_BASELINE, {**baseline, **named} if args.only else named)
        return 0
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        print(f"{_BASELINE.name} is rewritten by: make aot AOT_ARGS=--write", file=sys.stderr)
    return 1 if failures else 0


def _compile_case(task: tuple[int, int], cache: Path) -> dict[tuple[int, str], Report]:
    """Compile the launches of one case. Runs in a process of the pool, and so records them again, as kernels are not
    sent.
    """
    index, sm = task
    return {(sm, v.name): compile_variant(v, sm, cache) for v in record(SERVED[index], sm)}


if __name__ == "__main__":
    sys.exit(main())
