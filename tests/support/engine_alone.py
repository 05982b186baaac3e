"""Answers of an engine in the process of the tests, which those of services are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import engine_kit
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine import EngineRequest, SamplingParams


def answers_alone(
    settings: ExecutorSettings, requests: Sequence[tuple[Sequence[int], SamplingParams]]
) -> list[dict[int, list[int]]]:
    """Return the token ids of each request's samples, by index; a request is its prompt's ids and how to sample."""
    engine = build_engine(settings, lambda line: None).engine
    for number, (prompt, sampling) in enumerate(requests):
        engine.add(EngineRequest((0, number), str(number), tuple(prompt), sampling))
    tokens = engine_kit.run(engine).tokens
    return [
        {index: tokens[(0, number), index] for index in range(sampling.n)}
        for number, (_, sampling) in enumerate(requests)
    ]
