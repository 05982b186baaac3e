"""The tokenizer service alone: simulated clients before it, a simulated scheduler behind it."""

from __future__ import annotations

from pathlib import Path

from bench.services.faces import compared, faces, in_turns
from bench.services.measure import QUICK, Bench, Measurement, Timing, ceiling
from bench.services.processes import Workplace
from bench.services.report import Section

_MAX_TOKENS = 256
_MESSAGES_PER_S = 6400.0
"""Offered at any number of streams, from 64 on: so that what grows with the streams is theirs."""


def run(timing: Timing, model: Path) -> list[Section]:
    """Measure everything, with one worker process."""
    quick = timing is QUICK
    lengths = (2, 128) if quick else (2, 128, 1024, 8192)
    with Workplace() as place:
        scheduler = place.neighbour("engines", count=1)
        flags = ("--scheduler", scheduler.addresses[0], "--model", str(model), "--workers", "1")
        service = place.service("tokenizer", *flags)
        both = faces(place, timing, service, [service], scheduler)
        streams = [
            row
            for count in ((1, 64) if quick else (1, 64, 256, 1024))
            for row in in_turns(both, _generate(count), min(100.0, _MESSAGES_PER_S / count))
        ]
        bench = both["grpc"]
        rates = (50.0,) if quick else (25, 50, 100, 200, 400, 800)
        frames = ceiling(bench, _generate(64), rates)
        many = ceiling(bench, _generate(1024), () if quick else (2, 4, 8, 16, 32, 64))
        prompts = [
            row
            for length in lengths
            for row in in_turns(both, {"kind": "generate", "streams": 16, "prompt_len": length, "text": True}, 0.0)
        ]
        alone = Bench(timing, [service], bench.source)
        encode = [_unary(alone, "encode", length) for length in lengths]
        decode = [_unary(alone, "decode", length) for length in lengths]
    sections = [
        Section(
            "streams, the same messages/s from 64 on",
            "tokens",
            ("transport", "streams", "steps_per_s"),
            "latency",
            streams,
            compared(streams),
        ),
        Section("64 streams, steps/s rising until it falls behind", "tokens", ("steps_per_s",), "latency", frames),
        Section("1,024 streams, the same", "tokens", ("steps_per_s",), "latency", many),
        Section(
            "Generate: one-token requests on text, 16 at once",
            "requests",
            ("transport", "prompt_len"),
            "request",
            prompts,
        ),
        Section("Encode, 16 at once", "requests", ("prompt_len",), "request", encode),
        Section("Decode, 16 at once", "requests", ("prompt_len",), "request", decode),
    ]
    return [section for section in sections if section.rows]


def _generate(streams: int) -> dict[str, object]:
    return {"kind": "generate", "streams": streams, "prompt_len": 128, "max_tokens": _MAX_TOKENS}


def _unary(bench: Bench, kind: str, prompt_len: int) -> Measurement:
    return bench.measure({"kind": kind, "streams": 16, "prompt_len": prompt_len})
