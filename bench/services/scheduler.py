"""The scheduler alone: a simulated edge before it, simulated executors behind it.

What gRPC takes of it is measured beside it: a relay of bytes in its place, between the same neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from bench.services.measure import QUICK, Bench, Measurement, Timing, ceiling
from bench.services.processes import RedisServer, Workplace
from bench.services.report import Section

_MAX_TOKENS = 256
_STEPS_PER_S = 100.0


def run(timing: Timing) -> list[Section]:
    """Measure everything."""
    quick = timing is QUICK
    with Workplace() as place:
        with _scheduler(place, timing, 1) as bench:
            streams = _streams(bench, (1, 64) if quick else (1, 64, 256, 1024))
            steps = ceiling(bench, _decode(64 if quick else 256), (100.0,) if quick else (50, 100, 200, 400, 800, 1600))
            admissions = [_admit(bench, length) for length in ((2, 128) if quick else (2, 128, 1024, 8192))]
        with _scheduler(place, timing, 1, relay=True) as bench:
            relayed = _streams(bench, (1, 64) if quick else (1, 64, 256, 1024))
        executors = []
        for count in (2,) if quick else (1, 2, 4, 8, 16):
            with _scheduler(place, timing, count) as bench:
                row = bench.measure(_decode(64 * count), _STEPS_PER_S)
                executors.append(replace(row, load={**row.load, "executors": count}))
        redis = place.redis()
        with _scheduler(place, timing, 1, "--redis-url", redis.url, redis=redis) as bench:
            sessions = _admit(bench, 128, sessions=True)
    return [
        Section("streams on one executor", "tokens", ("streams", "steps_per_s"), "latency", streams),
        Section("the same, a relay of bytes in its place", "tokens", ("streams", "steps_per_s"), "latency", relayed),
        Section("frames: steps/s rising until it falls behind", "tokens", ("streams", "steps_per_s"), "latency", steps),
        Section("executors, 64 streams each", "tokens", ("executors", "streams"), "latency", executors),
        Section("admissions: one-token requests, 64 at once", "requests", ("prompt_len",), "request", admissions),
        Section("the same, each of a new session, with Redis", "requests", ("prompt_len",), "request", [sessions]),
    ]


@contextmanager
def _scheduler(
    place: Workplace,
    timing: Timing,
    executors: int,
    *flags: str,
    redis: RedisServer | None = None,
    relay: bool = False,
) -> Iterator[Bench]:
    engines = place.neighbour("engines", count=executors)
    addresses = ("--executors", ",".join(engines.addresses))
    if relay:
        service = place.service("relay", *addresses, package="bench.services")
    else:
        service = place.service("scheduler", *addresses, *flags)
    edge = place.neighbour("edge", address=service.address, path="/scalellm.v1.Scheduler/Connect", stamped=True)
    try:
        yield Bench(timing, [service], edge, engines, redis)
    finally:
        edge.close()
        service.close()
        engines.close()


def _decode(streams: int) -> dict[str, int]:
    return {"streams": streams, "prompt_len": 128, "max_tokens": _MAX_TOKENS}


def _streams(bench: Bench, counts: tuple[int, ...]) -> list[Measurement]:
    return [bench.measure(_decode(streams), _STEPS_PER_S) for streams in counts]


def _admit(bench: Bench, prompt_len: int, *, sessions: bool = False) -> Measurement:
    load = {"streams": 64, "prompt_len": prompt_len, "max_tokens": 1, "sessions": sessions}
    return bench.measure(load, steps_per_s=0.0)
