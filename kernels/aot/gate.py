"""The limits on changes of compiled kernels."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from scalellm.kernels.aot.compiler import Report

_SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes one program can have
_MORE_REGISTERS = 16  # fewer is noise of the allocator


def violations(sm: int, name: str, now: Report, before: Report | None) -> list[str]:
    """Return the violated limits of a variant, given its report in the baseline."""
    found = []
    if now.shared > _SHARED_LIMIT[sm]:
        found.append(f"shared memory is {now.shared} bytes, the limit is {_SHARED_LIMIT[sm]}")
    if before is None:
        found.append("is not in the baseline")
    else:
        if now.stack > before.stack:
            found.append(f"spills: {before.stack} -> {now.stack} bytes of local memory")
        if now.registers >= before.registers + _MORE_REGISTERS:
            found.append(f"registers: {before.registers} -> {now.registers}")
        if now.mma != before.mma:
            found.append(f"matrix instructions: {before.mma} -> {now.mma}")
        if len(now.loops) < len(before.loops):
            found.append(f"loops that load ahead: {len(before.loops)} -> {len(now.loops)}")
        for i, (loop, earlier) in enumerate(zip(now.loops, before.loops, strict=False)):
            if loop.buffers < earlier.buffers or loop.in_flight < earlier.in_flight:
                was = f"{earlier.buffers} buffers with {earlier.in_flight} loads under way"
                found.append(f"loop {i + 1} loads less ahead: {was} -> {loop.buffers} with {loop.in_flight}")
        if before.wide and not now.wide:
            found.append("no access to device memory has 128 bits any more")
    return [f"sm_{sm} {name}: {text}" for text in found]


def read_baseline(path: Path) -> dict[str, Report]:
    """Return the reports by "sm_90 case kernel"."""
    if not path.exists():
        return {}
    return {name: Report.from_json(fields) for name, fields in json.loads(path.read_text()).items()}


def write_baseline(path: Path, reports: Mapping[str, Report]) -> None:
    """Write one line per variant, sorted, so that diffs are readable."""
    lines = (f"  {json.dumps(name)}: {json.dumps(asdict(report))}" for name, report in sorted(reports.items()))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
