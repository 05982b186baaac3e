"""The modelled GPU alone: what clients would see if the services between them and the engine took no time."""

from __future__ import annotations

import random
from dataclasses import dataclass

from bench.services.neighbours.tally import Tally
from bench.services.neighbours.wire import unique_ids
from bench.virtual.executor import StepClock
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.fake_model_runner import STEP_TIME_PRESETS, FakeModelRunner
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Modelled:
    """Gaps between a stream's tokens in milliseconds, and tokens per second of all streams."""

    itl_p50: float
    itl_p99: float
    tokens_per_s: float


def modelled(config: EngineConfig, preset: str, streams: int, prompt_len: int, max_tokens: int) -> Modelled:
    """Run the engine on virtual time under the closed loop of `neighbours.clients`: new prompts are part of its steps.

    Args:
        config: The measured executor's.
        preset: Its model of step times.
        streams: Requests in flight; the first of each stream has a random share of `max_tokens`.
        prompt_len: Tokens of each prompt; no two begin alike.
        max_tokens: Tokens of each answer.
    """
    clock, tally = StepClock(), Tally()
    model = STEP_TIME_PRESETS[preset]
    runner = FakeModelRunner(config.vocab_size, config.eos_token_ids, model, clock.sleep, clock, overlaps=True)
    engine = Engine(config, runner, clock)
    number, rest = 0, range(2, prompt_len)
    last: dict[int, float] = {}

    def send(length: int) -> None:
        nonlocal number
        number += 1
        sampling = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        engine.add(EngineRequest((0, number), str(number), (*unique_ids(number), *rest), sampling))

    rng = random.Random(streams)
    for _ in range(streams):
        send(rng.randint(1, max_tokens))
    began = 0.0
    for step in range(3 * max_tokens):  # until each stream's first request has ended, then for two more
        if step == max_tokens:
            tally.take()
            began = clock()
        result = engine.step()
        for tokens in result.tokens:
            handle = tokens.key[1]
            tally.counts["tokens"] += len(tokens.token_ids)
            if handle in last:
                tally.observe("itl", clock() - last[handle])
            last[handle] = clock()
        for finished in result.finished:
            del last[finished.key[1]]
            send(max_tokens)
    report = tally.take()
    return Modelled(report["itl_ms"]["p50"], report["itl_ms"]["p99"], report["tokens"] / (clock() - began))
