"""Gemma 3 270M: another family, another tokenizer, another quantisation."""

from __future__ import annotations

import random

import pytest

from prompts import PROMPTS
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.tokenizer.text.loading import load_model_tokenizer


@pytest.mark.slow
def test_gemma_3_equals_transformers(load, model_dir, run_engine) -> None:
    model = load(model_dir("gemma3-270m"), True)
    tokenizer = load_model_tokenizer(model_dir("gemma3-270m")).tokenizer
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    requests = [(prompt, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)) for prompt in prompts]
    engine = model.engine(num_blocks=32, max_model_len=448)
    batched = run_engine(engine, requests, arrivals=random.Random(4))
    assert engine.stats().preemptions > 0
    for prompt, outcome in zip(prompts, batched, strict=True):
        model.assert_greedy(prompt, outcome.token_ids[0])
    for number in (0, 11, 20):
        (alone,) = run_engine(model.engine(), [requests[number]])
        assert alone.token_ids[0] == batched[number].token_ids[0]
