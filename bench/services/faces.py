"""The tokenizer service's two faces, gRPC and HTTP, under the same load in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.services.measure import Bench, Measurement, Timing
from bench.services.processes import Neighbour, Service, Workplace


def faces(
    place: Workplace, timing: Timing, tokenizer: Service, services: Sequence[Service], far: Neighbour | None = None
) -> dict[str, Bench]:
    """Return a bench of the same services for each transport.

    Args:
        place: Starts the clients, one neighbour per transport.
        timing: Timing of every measurement.
        tokenizer: The service that they call.
        services: The measured services.
        far: The simulated scheduler, if it is one: tokens then say when they were sent.
    """
    calls = {"grpc": ("clients", tokenizer.address), "http": ("http_clients", tokenizer.http_address)}
    return {
        transport: Bench(timing, services, place.neighbour(role, address=address, stamped=far is not None), far)
        for transport, (role, address) in calls.items()
    }


def in_turns(
    benches: Mapping[str, Bench], load: Mapping[str, Any], steps_per_s: float | None = None
) -> list[Measurement]:
    """Measure one load by each transport; `transport` becomes a part of the measurement's load."""
    rows = [(transport, bench.measure(load, steps_per_s)) for transport, bench in benches.items()]
    return [replace(row, load={"transport": transport, **row.load}) for transport, row in rows]


def compared(rows: Sequence[Measurement]) -> list[str]:
    """CPU time per token of the tokenizer's workers, by HTTP against gRPC (target: no more)."""
    by_streams: dict[int, dict[str, float]] = {}
    for row in rows:
        tokens = max(1, row.counts.get("tokens", 0))
        by_streams.setdefault(row.load["streams"], {})[row.load["transport"]] = 1e6 * row.cpu_s["worker"] / tokens
    return [
        f"{streams} streams: the worker takes {found['http']:.1f} us per token by HTTP, {found['grpc']:.1f} by gRPC "
        f"(target: no more, {'met' if found['http'] <= found['grpc'] else 'missed'})"
        for streams, found in by_streams.items()
    ]
