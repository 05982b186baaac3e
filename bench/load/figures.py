"""Figures of one step: counts, rates, percentiles, goodput."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.load.records import RequestRecord

METRICS = ("ttft", "tpot", "itl", "e2e")
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in milliseconds that a good request keeps, by metric; `itl` holds for each of its gaps."""

    limits_ms: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """`ttft:200,itl:50,e2e:2000`. ValueError for anything else."""
        limits: dict[str, float] = {}
        for entry in text.split(",") if text.strip() else ():
            name, _, limit = entry.strip().partition(":")
            try:
                limits[name] = float(limit)
            except ValueError:
                limits[name] = 0.0
            if name not in METRICS or not limits[name] > 0:
                raise ValueError(f"{entry!r} is no limit: one of {', '.join(METRICS)}, a colon, milliseconds above 0")
        return cls(limits)

    def is_met(self, record: RequestRecord) -> bool:
        """True if the request ended well and within all limits. What was not measured meets no limit on it."""
        seconds = {"ttft": record.ttft, "tpot": record.tpot, "itl": max(record.itls, default=None), "e2e": record.e2e}
        # A single message has no gaps, and a single token no time per further token.
        if len(record.arrivals) == 1:
            seconds["itl"] = seconds["tpot"] = 0.0
        values = {name: seconds[name] for name in self.limits_ms}
        return record.status == "ok" and all(
            value is not None and 1e3 * value <= self.limits_ms[name] for name, value in values.items()
        )


def latencies_ms(records: Iterable[RequestRecord]) -> dict[str, list[float]]:
    """Milliseconds of the requests that ended well: TTFT, TPOT and e2e one per request, ITL one per gap."""
    done = [record for record in records if record.status == "ok"]
    seconds = {
        "ttft": [record.ttft for record in done if record.ttft is not None],
        "tpot": [record.tpot for record in done if record.tpot is not None],
        "itl": [gap for record in done for gap in record.itls],
        "e2e": [record.e2e for record in done],
    }
    return {name: [1e3 * value for value in values] for name, values in seconds.items()}


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles (linear between ranks) and maximum; None without values."""
    if not values:
        return None
    percentiles = np.percentile(values, _PERCENTILES)
    named = {f"p{rank}": float(value) for rank, value in zip(_PERCENTILES, percentiles, strict=True)}
    return {"mean": float(np.mean(values)), **named, "max": float(max(values))}


def breakdown_ms(records: Iterable[RequestRecord]) -> dict[str, float] | None:
    """Mean milliseconds by part of the servers' own breakdowns; `client` is what the client saw beyond them."""
    told = [record for record in records if record.status == "ok" and record.server.breakdown]
    if not told:
        return None
    totals: Counter[str] = Counter()
    for record in told:
        parts = record.server.breakdown or {}
        totals.update(parts)
        totals["client"] += max(0, round(1e9 * record.e2e) - parts.get("total", 0))
    return {name: 1e-6 * total / len(told) for name, total in totals.items()}


def summarise(records: Sequence[RequestRecord], slo: Slo | None = None) -> dict[str, Any]:
    """All figures of a step. Rates are over the time from the first request's sending to the last one's end.

    Token counts are the servers' where they say; only requests that ended well count, but for `tokens_lost`: what had
    come of the others.
    """
    by_status = Counter(record.status for record in records)
    done = [record for record in records if record.status == "ok"]
    begun = min((record.sent for record in records), default=0.0)
    duration = max((record.ended for record in records), default=0.0) - begun
    output_tokens = sum(record.output_tokens for record in done)
    input_tokens = sum(record.input_tokens for record in done)
    per_second = 1 / duration if duration > 0 else 0.0
    return {
        "sent": len(records),
        "ok": by_status["ok"],
        "failed": by_status["failed"],
        "cancelled": by_status["cancelled"],
        "failures": dict(sorted(Counter(record.kind for record in records if record.status == "failed").items())),
        "duration_s": duration,
        "input_tokens": input_tokens,
        "planned_input_tokens": sum(record.input_len for record in done),
        "cached_tokens": sum(record.server.cached_tokens or 0 for record in done),
        "output_tokens": output_tokens,
        "planned_output_tokens": sum(record.output_len for record in done),
        "tokens_lost": sum(record.output_tokens for record in records if record.status != "ok"),
        "messages": sum(len(record.counts) for record in done),
        "peak_in_flight": _peak_in_flight(records),
        "request_throughput": len(done) * per_second,
        "output_throughput": output_tokens * per_second,
        "total_throughput": (input_tokens + output_tokens) * per_second,
        "goodput": None if slo is None else sum(map(slo.is_met, records)) * per_second,
        "good_requests": None if slo is None else sum(map(slo.is_met, records)),
        "send_lag_ms": spread([1e3 * (record.sent - record.due) for record in records]),
        "breakdown_ms": breakdown_ms(records),
        **{f"{name}_ms": spread(values) for name, values in latencies_ms(records).items()},
    }


def _peak_in_flight(records: Iterable[RequestRecord]) -> int:
    # An end at the moment of a beginning makes room for it.
    changes = sorted([(record.sent, 1) for record in records] + [(record.ended, -1) for record in records])
    peak = running = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak
