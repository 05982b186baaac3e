"""Tables for people, JSON for everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.services.measure import Measurement

_LABELS = {
    "transport": "transport",
    "streams": "streams",
    "steps_per_s": "steps/s",
    "prompt_len": "prompt",
    "executors": "executors",
    "redis": "Redis",
}


@dataclass(frozen=True)
class Section:
    """Measurements that belong together.

    Attributes:
        title: Name of the part of the load that varies.
        per: Divisor of CPU time: tokens or requests.
        keys: Parts of the load that are columns.
        latency: Name of the shown latency.
        rows: The measurements.
        verdicts: Lines below the table: figures against their targets.
    """

    title: str
    per: str
    keys: Sequence[str]
    latency: str
    rows: Sequence[Measurement]
    verdicts: Sequence[str] = ()

    def print(self, console: Console) -> None:
        """Show as a table."""
        total = sum(sum(row.cpu_s.values()) for row in self.rows)
        roles = [role for role in self.rows[0].cpu_s if sum(row.cpu_s[role] for row in self.rows) > total / 100]
        table = Table(title=self.title, title_justify="left", header_style="bold")
        headers = [
            *(_LABELS[key] for key in self.keys),
            f"{self.per}/s",
            *((f"µs CPU/{self.per[:-1]}", "µs/message") if self.per == "tokens" else (f"µs CPU/{self.per[:-1]}",)),
            *(f"{role} µs" for role in roles if len(roles) > 1),
            f"{self.latency} p50 ms",
            "p99 ms",
            "cores",
            "neighbours",
            *dict.fromkeys(name for row in self.rows for name in row.extra),
        ]
        for header in headers:
            table.add_column(header, justify="right")
        for row in self.rows:
            table.add_row(*self._cells(row, roles))
        console.print(table)
        for verdict in self.verdicts:
            console.print(verdict)
        growth = memory_per_stream(self.rows)
        if growth is not None:
            console.print(f"memory per stream: {growth / 1024:.1f} KiB")
        for row in self.rows:
            where = ", ".join(f"{_LABELS[key]} {row.load[key]}" for key in self.keys)
            if row.bottleneck:
                console.print(f"[yellow]at {where}: limited by {row.bottleneck}, not by the service[/yellow]")
            if row.counts.get("errors"):
                console.print(f"[red]at {where}: {row.counts['errors']} requests failed[/red]")
        console.print()

    def _cells(self, row: Measurement, roles: Sequence[str]) -> list[str]:
        count = max(1, row.counts.get(self.per, 0))
        latency = row.latencies.get(self.latency, {})
        cells = [f"{row.load[key]:g}" if isinstance(row.load[key], float) else str(row.load[key]) for key in self.keys]
        cells.append(f"{(row.tokens_per_s if self.per == 'tokens' else row.requests_per_s):,.0f}")
        cells.append(f"{row.cpu_us(self.per):,.1f}")
        if self.per == "tokens":
            cells.append(f"{row.cpu_us('messages'):,.0f}")
        if len(roles) > 1:
            cells += [f"{1e6 * row.cpu_s[role] / count:,.1f}" for role in roles]
        cells += [f"{latency[key]:.2f}" if latency else "-" for key in ("p50", "p99")]
        cells.append(f"{row.cores:.2f}")
        cells.append(", ".join(f"{role} {cores:.2f}" for role, cores in row.neighbour_cores.items()))
        cells += [f"{value:,.2f}" for value in row.extra.values()]
        return cells


def memory_per_stream(rows: Sequence[Measurement]) -> float | None:
    """Bytes that one more stream takes, from the fewest to the most streams; None when their number does not vary."""
    by_streams = {int(row.load["streams"]): row.memory for row in rows if "streams" in row.load}
    if len(by_streams) < 2:
        return None
    fewest, most = min(by_streams), max(by_streams)
    return (by_streams[most] - by_streams[fewest]) / (most - fewest)


def highest(sections: Sequence[Section], per: str) -> float:
    """The most tokens or requests per second of all measurements."""
    rates = [
        row.tokens_per_s if per == "tokens" else row.requests_per_s
        for section in sections
        for row in section.rows
        if section.per == per
    ]
    return max(rates, default=0.0)


def report(service: str, sections: Sequence[Section], output: Path | None) -> None:
    """Print all tables and the ceilings; write the JSON file."""
    console = Console(width=None if os.isatty(1) else 200)
    console.print(f"[bold]{service}[/bold], {os.cpu_count()} cores; CPU time is the service's alone\n")
    for section in sections:
        section.print(console)
    for per in ("tokens", "requests"):
        console.print(f"most {per}/s: {highest(sections, per):,.0f}")
    if output is not None:
        record: dict[str, Any] = {
            "service": service,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpus": len(os.sched_getaffinity(0)),
            "versions": {name: version(name) for name in ("scalellm-server", "grpcio", "protobuf")},
            "max_tokens_per_s": highest(sections, "tokens"),
            "max_requests_per_s": highest(sections, "requests"),
            "sections": [
                {
                    "title": section.title,
                    "verdicts": section.verdicts,
                    "cpu_us_per": section.per,
                    "memory_per_stream": memory_per_stream(section.rows),
                    "rows": [row.as_json() | {"cpu_us": row.cpu_us(section.per)} for row in section.rows],
                }
                for section in sections
            ],
        }
        output.write_text(json.dumps(record, indent=2) + "\n")
