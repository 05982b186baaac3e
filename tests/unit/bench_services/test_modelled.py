"""Throughput of the modelled GPU alone against its own formula."""

from __future__ import annotations

import pytest

from bench.services.modelled import modelled
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.fake_model_runner import STEP_TIME_PRESETS

PRESET = "h200-llama-8b"
CONFIG = EngineConfig(num_blocks=512, max_model_len=512, vocab_size=50_000, eos_token_ids=frozenset(), max_num_seqs=16)


def test_one_stream_is_paced_by_steps_of_one() -> None:
    alone = modelled(CONFIG, PRESET, streams=1, prompt_len=100, max_tokens=20)
    model = STEP_TIME_PRESETS[PRESET]
    step = model.base + model.per_decode + 110 * model.per_context_token
    assert alone.itl_p50 == pytest.approx(1e3 * step, rel=1e-3)
    # An answer of 20 tokens takes 19 such steps and the prompt's.
    prompt = model.base + 100 * model.per_prefill_token
    assert alone.tokens_per_s == pytest.approx(20 / (19 * step + prompt), rel=0.02)


def test_new_prompts_are_in_the_steps_of_others() -> None:
    few, many = (modelled(CONFIG, PRESET, streams=n, prompt_len=100, max_tokens=20) for n in (2, 16))
    prompt = 1e3 * 100 * STEP_TIME_PRESETS[PRESET].per_prefill_token
    assert few.itl_p99 == pytest.approx(few.itl_p50 + prompt, rel=0.05)  # one at a time
    assert many.itl_p99 > many.itl_p50 + 1.9 * prompt
    assert many == modelled(CONFIG, PRESET, streams=16, prompt_len=100, max_tokens=20)
