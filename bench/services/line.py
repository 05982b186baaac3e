"""The whole line around a fake engine with the step times of an H200: what the services add to a GPU's time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.services.executor import FAKE_LIMITS
from bench.services.measure import QUICK, Bench, Measurement, Timing
from bench.services.processes import Workplace
from bench.services.report import Section
from services.executor.engine.fake_model_runner import STEP_TIME_PRESETS

_PRESET = "h200-llama-8b"
_PROMPT_LEN, _MAX_TOKENS = 128, 256
_TARGET_STREAMS = 64
_TARGETS = {"added p50 ms": 1.0, "added p99 ms": 5.0}


def run(timing: Timing, model: Path) -> list[Section]:
    """Measure everything."""
    quick = timing is QUICK
    with Workplace() as place:
        redis = place.redis()
        fake = ("--model", str(model), "--engine", "fake", "--fake-preset", _PRESET, *FAKE_LIMITS)
        executor = place.service("executor", *fake)
        scheduler = place.service("scheduler", "--executors", executor.address, "--redis-url", redis.url)
        flags = ("--scheduler", scheduler.address, "--model", str(model), "--redis-url", redis.url)
        tokenizer = place.service("tokenizer", *flags)
        clients = place.neighbour("clients", address=tokenizer.address, stamped=False)
        bench = Bench(timing, [tokenizer, scheduler, executor], clients)
        streams = [_decode(bench, count) for count in ((1, 64) if quick else (1, 64, 256, 1024))]
        prompts = [
            bench.measure({"kind": "generate", "streams": 1, "prompt_len": length, "text": True})
            for length in ((2, 128) if quick else (2, 128, 1024, 8192))
        ]
    return [
        Section("streams; added: to the modelled step", "tokens", ("streams",), "itl", streams, verdicts(streams)),
        Section("one-token requests on text, one at a time", "requests", ("prompt_len",), "ttft", prompts),
    ]


def _decode(bench: Bench, streams: int) -> Measurement:
    load = {"kind": "generate", "streams": streams, "prompt_len": _PROMPT_LEN, "max_tokens": _MAX_TOKENS}
    row = bench.measure(load)
    step = step_seconds(streams, _PROMPT_LEN + _MAX_TOKENS // 2)
    itl = row.latencies.get("itl", {"p50": 0.0, "p99": 0.0})
    extra = {
        "added p50 ms": itl["p50"] - 1e3 * step,
        "added p99 ms": itl["p99"] - 1e3 * step,
        "of ideal": row.tokens_per_s * step / streams,
    }
    return replace(row, extra=extra)


def verdicts(rows: Sequence[Measurement]) -> list[str]:
    """The line's targets and what came; with more streams, how much of the modelled GPU's tokens arrived."""
    said = []
    for row in rows:
        streams = row.load["streams"]
        share = f"{row.extra['of ideal']:.1%} of the modelled GPU's tokens/s"
        if streams == _TARGET_STREAMS:
            figures = (
                f"{name.removesuffix(' ms')} {row.extra[name]:.2f} ms (target: at most {target:g}, "
                f"{'met' if row.extra[name] <= target else 'missed'})"
                for name, target in _TARGETS.items()
            )
            said.append(f"{streams} streams: ITL {', '.join(figures)}; {share}")
        elif streams > _TARGET_STREAMS:
            said.append(f"{streams} streams: {share}")
    return said


def step_seconds(streams: int, context: int) -> float:
    """The modelled time of a decode step, in which each of the streams has `context` tokens."""
    model = STEP_TIME_PRESETS[_PRESET]
    return model.base + streams * (model.per_decode + model.per_context_token * context)
