"""The executor alone: a simulated scheduler before it, the fake engine or the real model in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from bench.services.measure import QUICK, Bench, Measurement, Timing
from bench.services.processes import Workplace
from bench.services.report import Section

_MAX_TOKENS = 256
FAKE_LIMITS = MappingProxyType(
    {"max_model_len": 32768, "max_num_seqs": 1024, "num_blocks": 65536, "max_num_batched_tokens": 8192}
)
"""A cache that holds 1,024 long streams, and steps as on a GPU."""


def fake_flags(model: Path, preset: str = "instant") -> list[str]:
    """Flags of an executor with the fake engine and its limits."""
    limits = [part for name, value in FAKE_LIMITS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["--model", str(model), "--engine", "fake", "--fake-preset", preset, *limits]


_MODEL = Timing(15.0, 20.0)


def run(timing: Timing, model: Path) -> list[Section]:
    """Measure the front with the fake engine, then the engine with the real model."""
    quick = timing is QUICK
    counts = (64,) if quick else (1, 64, 256, 1024)
    with Workplace() as place:
        with _executor(place, timing, *fake_flags(model, "h200-llama-8b")) as bench:
            paced = [_decode(bench, count) for count in counts]
        with _executor(place, timing, *fake_flags(model)) as bench:
            instant = [_decode(bench, count) for count in counts]
            prompts = [
                bench.measure({"streams": 16, "prompt_len": length, "max_tokens": 1})
                for length in ((2, 128) if quick else (2, 128, 1024, 8192))
            ]
        with _executor(place, timing if quick else _MODEL, "--model", str(model), "--max-model-len", "1024") as bench:
            real = [_decode(bench, count, max_tokens=128) for count in ((8,) if quick else (1, 8, 64))]
    return [
        Section("fake engine, steps as of an 8B model on an H200", "tokens", ("streams",), "request", paced),
        Section("fake engine, steps that take no time", "tokens", ("streams",), "request", instant),
        Section("fake engine: one-token requests, 16 at once", "requests", ("prompt_len",), "request", prompts),
        Section("real model", "tokens", ("streams",), "request", real),
    ]


@contextmanager
def _executor(place: Workplace, timing: Timing, *flags: str) -> Iterator[Bench]:
    service = place.service("executor", *flags)
    edge = place.neighbour("edge", address=service.address, path="/scalellm.v1.Executor/Execute", stamped=False)
    try:
        yield Bench(timing, [service], edge)
    finally:
        edge.close()
        service.close()


def _decode(bench: Bench, streams: int, max_tokens: int = _MAX_TOKENS) -> Measurement:
    return bench.measure({"streams": streams, "prompt_len": 128, "max_tokens": max_tokens})
