"""The whole line around a fake engine with the step times of an H200: what the services add to a GPU's time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.services.executor import FAKE_LIMITS, fake_flags
from bench.services.faces import compared, faces, in_turns
from bench.services.measure import QUICK, Measurement, Timing
from bench.services.modelled import Modelled, modelled
from bench.services.processes import Workplace
from bench.services.report import Section
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings

_PRESET = "h200-llama-8b"
_PROMPT_LEN, _MAX_TOKENS = 128, 256
_TARGET_STREAMS = 64
_TARGETS = {"added p50 ms": 1.0, "added p99 ms": 5.0}


def run(timing: Timing, model: Path) -> list[Section]:
    """Measure everything."""
    quick = timing is QUICK
    with Workplace() as place:
        redis = place.redis()
        executor = place.service("executor", *fake_flags(model, _PRESET))
        scheduler = place.service("scheduler", "--executors", executor.address, "--redis-url", redis.url)
        flags = ("--scheduler", scheduler.address, "--model", str(model), "--redis-url", redis.url)
        tokenizer = place.service("tokenizer", *flags)
        both = faces(place, timing, tokenizer, [tokenizer, scheduler, executor])
        settings = ExecutorSettings.model_validate({"model": str(model), "engine": "fake", **FAKE_LIMITS})
        config = build_engine(settings, lambda _: None).engine.config
        load = {"kind": "generate", "prompt_len": _PROMPT_LEN, "max_tokens": _MAX_TOKENS}
        streams = [
            _beside_model(row, alone)
            for count in ((1, 64) if quick else (1, 64, 256, 1024))
            for alone in [modelled(config, _PRESET, count, _PROMPT_LEN, _MAX_TOKENS)]
            for row in in_turns(both, {**load, "streams": count})
        ]
        prompts = [
            row
            for length in ((2, 128) if quick else (2, 128, 1024, 8192))
            for row in in_turns(both, {"kind": "generate", "streams": 1, "prompt_len": length, "text": True})
        ]
    return [
        Section(
            "streams; added: to the ITL of the modelled GPU alone, new prompts and all",
            "tokens",
            ("transport", "streams"),
            "itl",
            streams,
            [*verdicts(streams), *compared(streams)],
        ),
        Section("one-token requests on text, one at a time", "requests", ("transport", "prompt_len"), "ttft", prompts),
    ]


def _beside_model(row: Measurement, alone: Modelled) -> Measurement:
    itl = row.latencies.get("itl", {"p50": 0.0, "p99": 0.0})
    extra = {
        "model's p50": alone.itl_p50,
        "model's p99": alone.itl_p99,
        "added p50 ms": itl["p50"] - alone.itl_p50,
        "added p99 ms": itl["p99"] - alone.itl_p99,
        "of ideal": row.tokens_per_s / alone.tokens_per_s,
    }
    return replace(row, extra=extra)


def verdicts(rows: Sequence[Measurement]) -> list[str]:
    """The line's targets and what came; with more streams, how much of the modelled GPU's tokens arrived."""
    said = []
    for row in rows:
        streams = row.load["streams"]
        load = f"{row.load['transport']}, {streams} streams"
        share = f"{row.extra['of ideal']:.1%} of the modelled GPU's tokens/s"
        if streams == _TARGET_STREAMS:
            figures = (
                f"{name.removesuffix(' ms')} {row.extra[name]:.2f} ms (target: at most {target:g}, "
                f"{'met' if row.extra[name] <= target else 'missed'})"
                for name, target in _TARGETS.items()
            )
            said.append(f"{load}: ITL {', '.join(figures)}; {share}")
        elif streams > _TARGET_STREAMS:
            said.append(f"{load}: {share}")
    return said
