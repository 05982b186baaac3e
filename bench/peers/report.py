"""The table for people, the file for everything else."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.peers.measure import Measurement
from bench.peers.targets import targets
from bench.peers.weights import ROOT

SCHEMA = 1
# What tells how fast a processor multiplies small numbers.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
_WIDTH = 200


@dataclass
class Report:
    """All that was found; written after each measurement, so that an interrupted run loses none.

    Attributes:
        header: Model, options, machine: plain values.
        versions: By system and package.
        failures: Systems, forms and loads that could not be measured, with the reason.
        measurements: In order.
    """

    header: dict[str, Any]
    versions: dict[str, Mapping[str, str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)

    def put(self, found: Measurement) -> None:
        """Take a measurement in, in the place of an earlier one of the same: one more round."""
        for index, entry in enumerate(self.measurements):
            if (entry.system, entry.form, entry.workload) == (found.system, found.form, found.workload):
                self.measurements[index] = found
                return
        self.measurements.append(found)

    def notes(self) -> list[str]:
        """Return the facts needed to read the figures, beyond each measurement's own notes."""
        found = []
        for load in _loads(self.measurements):
            entries = [entry for entry in self.measurements if entry.workload == load]
            if len({entry.prompts for entry in entries}) > 1:
                found.append(f"{load}: other prompts were sent to some")
            for what in ("output_tokens", "input_tokens"):
                counts = {f"{entry.system} {entry.form}": getattr(entry, what) for entry in entries}
                if len(set(counts.values())) > 1:
                    told = ", ".join(f"{name} {count}" for name, count in counts.items())
                    found.append(f"{load}: different {what.replace('_', ' ')}: {told}")
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema": SCHEMA,
            **self.header,
            "versions": {name: dict(versions) for name, versions in self.versions.items()},
            "failures": self.failures,
            "notes": self.notes(),
            "measurements": [entry.as_json() for entry in self.measurements],
            "targets": [target.as_json() for target in targets(self.measurements)],
        }

    def write(self, path: Path) -> None:
        """Write the JSON file, for others to read: without the names of this machine's folders."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_json(), indent=2) + "\n"
        path.write_text(text.replace(str(ROOT), ".").replace(str(Path.home()), "~"))

    def print(self, console: Console) -> None:
        """Tables of figures, ratios and targets; what could not be measured."""
        loads = _loads(self.measurements)
        rows = list(dict.fromkeys((entry.system, entry.form) for entry in self.measurements))
        by_key = {(entry.system, entry.form, entry.workload): entry for entry in self.measurements}
        figures, ratios = Table(title="Figures"), Table(title="Output tok/s over the best peer's (1: decode tok/s)")
        for table in (figures, ratios):
            table.add_column("system")
            table.add_column("form")
        for load in loads:
            figures.add_column(_HEADERS.get(load, f"{load} at once: tok/s, TTFT p50 / p99 s"), justify="right")
            ratios.add_column(load, justify="right")
        figures.add_column("peak MB", justify="right")
        for system, form in rows:
            entries = [by_key.get((system, form, load)) for load in loads]
            peak = max(entry.peak_mb for entry in entries if entry is not None)
            figures.add_row(system, form, *map(_cell, entries), f"{peak:,.0f}")
            ratios.add_row(system, form, *(self._ratio(entry) for entry in entries))
        console.print(figures)
        console.print(ratios)
        self._print_targets(console)
        for name, reason in self.failures.items():
            console.print(f"not measured: {name}: {reason}", style="yellow", markup=False)
        for entry in self.measurements:
            for note in entry.notes:
                console.print(f"{entry.system} {entry.form}, {entry.workload}: {note}", style="yellow", markup=False)
        for note in self.notes():
            console.print(note, style="yellow", markup=False)

    def _ratio(self, entry: Measurement | None) -> str:
        if entry is None:
            return ""
        rivals = [other for other in self.measurements if not other.is_ours and other.workload == entry.workload]
        best = max((_main(other) for other in rivals), default=0.0)
        return f"{_main(entry) / best:.2f}" if best and _main(entry) else ""

    def _print_targets(self, console: Console) -> None:
        found = targets(self.measurements)
        if not found:
            return
        table = Table(title="Targets")
        for name in ("", "ours", "best peer"):
            table.add_column(name)
        for name in ("ratio", "must be", ""):
            table.add_column(name, justify="right")
        for target in found:
            must = f"{'<=' if target.is_time else '>='} {target.limit:g}"
            told = "reached" if target.is_reached else "not reached"
            table.add_row(target.name, target.ours, target.best, f"{target.ratio:.2f}", must, told)
        console.print(table)
        console.print(
            "End to end over the engine alone: make bench. The line on a modelled H200: make bench-line.", style="dim"
        )


_HEADERS = {
    "1": "1 stream: TTFT ms, decode tok/s",
    "shared": "shared: tok/s, TTFT p50 / p99 s",
    "sessions": "sessions: tok/s, TTFT p50 / p99 s",
}


def console() -> Console:
    """Return a console as wide as the terminal; a wide one where there is none."""
    return Console(width=None if os.isatty(1) else _WIDTH)


def machine() -> dict[str, Any]:
    """Describe the machine of the measurements."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(told.get("flags", "").split())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": told.get("model name", platform.processor()),
        "cpu_flags": [name for name in _CPU_FLAGS if name in flags],
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def _loads(measurements: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(entry.workload for entry in measurements))


def _main(entry: Measurement) -> float:
    return entry.decode_rate if entry.workload == "1" else entry.rate


def _cell(entry: Measurement | None) -> str:
    if entry is None:
        return ""
    if entry.workload == "1":
        decode_rate = f"{entry.decode_rate:.1f}" if entry.decode_rate else "-"
        return f"{1e3 * entry.ttft_p50_s:.0f}, {decode_rate}"
    return f"{entry.rate:.1f}, {entry.ttft_p50_s:.2f} / {entry.ttft_p99_s:.2f}"
