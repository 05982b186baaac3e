"""Greedy output equals transformers' token for token, whatever else the engine does at the same time.

The real model is SmolLM2-135M on forty real prompts.
"""

from __future__ import annotations

import random

import pytest
import torch

from prompts import PROMPTS
from services.executor.engine.config import CapacityPolicy
from services.executor.engine.sampling_params import SamplingParams
from services.tokenizer.text.loading import load_model_tokenizer


def greedy(max_tokens: int, **more) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **more)


MAX_TOKENS = 10


@pytest.fixture(scope="module")
def model(load, model_dir):
    return load(model_dir("smollm2-135m-instruct"), True)


@pytest.fixture(scope="module")
def prompts(model_dir) -> list[list[int]]:
    tokenizer = load_model_tokenizer(model_dir("smollm2-135m-instruct")).tokenizer
    return [tokenizer.encode(text).ids for text in PROMPTS]


@pytest.fixture(scope="module")
def some(prompts) -> list[list[int]]:
    """Every other prompt: all of them would take minutes."""
    return prompts[::2]


@pytest.fixture(scope="module")
def alone(model, some, run_engine) -> list[list[int]]:
    """Each prompt by itself, one after the other."""
    engine = model.engine(enable_prefix_cache=False)
    return [run_engine(engine, [(prompt, greedy(MAX_TOKENS))])[0].token_ids[0] for prompt in some]


def test_alone(model, some, alone) -> None:
    for prompt, output in zip(some, alone, strict=True):
        assert len(output) == MAX_TOKENS
        model.assert_greedy(prompt, output)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"max_num_batched_tokens": 48}, id="chunked-prefill"),
        pytest.param({"num_blocks": 32, "max_model_len": 448}, id="forced-preemption"),
        pytest.param(
            {"num_blocks": 32, "max_model_len": 448, "capacity_policy": CapacityPolicy.GUARANTEED_NO_EVICT},
            id="guaranteed-no-evict",
        ),
    ],
)
def test_in_random_batches(model, some, alone, run_engine, settings) -> None:
    engine = model.engine(**settings)
    requests = [(prompt, greedy(MAX_TOKENS)) for prompt in some]
    outcomes = run_engine(engine, requests, arrivals=random.Random(11))
    assert [outcome.token_ids[0] for outcome in outcomes] == alone
    preempted = engine.stats().preemptions
    assert (preempted > 0) == ("capacity_policy" not in settings and "num_blocks" in settings)


def test_prefix_hits(model, some, alone, run_engine) -> None:
    engine = model.engine()
    requests = [(prompt, greedy(MAX_TOKENS)) for prompt in some]
    cold = run_engine(engine, requests)
    warm = run_engine(engine, requests, arrivals=random.Random(5))
    for prompt, first, second, expected in zip(some, cold, warm, alone, strict=True):
        assert first.token_ids[0] == second.token_ids[0] == expected
        assert second.finish.usage.cached_tokens == (len(prompt) - 1) // 16 * 16


def test_logprobs(model, prompts, run_engine) -> None:
    sampling = SamplingParams(max_tokens=6, temperature=0.8, seed=3, logprobs=5, prompt_logprobs=1, ignore_eos=True)
    chosen = prompts[:6] + prompts[30:32]
    outcomes = run_engine(model.engine(max_num_batched_tokens=40), [(prompt, sampling) for prompt in chosen])
    for prompt, outcome in zip(chosen, outcomes, strict=True):
        output = outcome.token_ids[0]
        expected = model.logprobs(prompt, output)
        ids = torch.tensor([*prompt, *output])
        scores = expected[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(outcome.prompt_logprobs[-(len(prompt) - 1) :] if len(prompt) > 1 else []),
            scores[: len(prompt) - 1],
            atol=1e-3,
            rtol=0,
        )
        torch.testing.assert_close(torch.tensor(outcome.logprobs), scores[len(prompt) - 1 :], atol=1e-3, rtol=0)
        for place, top in enumerate(outcome.top_logprobs):
            best = expected[len(prompt) - 1 + place].topk(5)
            assert [token for token, _ in top] == best.indices.tolist()
            torch.testing.assert_close(torch.tensor([value for _, value in top]), best.values, atol=1e-3, rtol=0)


def test_same_seed_same_text(model, prompts, run_engine) -> None:
    """Alone, in a batch, after preemption, with other samples beside it, and continued elsewhere."""
    chosen = [prompts[number] for number in (0, 5, 16, 30)]
    requests = [
        (prompt, SamplingParams(max_tokens=16, temperature=0.9, top_p=0.95, seed=40 + number, ignore_eos=True))
        for number, prompt in enumerate(chosen)
    ]
    alone = [run_engine(model.engine(), [request])[0].token_ids[0] for request in requests]
    noise = [(prompt, greedy(16)) for prompt in prompts[6:26]]
    squeezed = model.engine(num_blocks=32, max_model_len=448)
    outcomes = run_engine(squeezed, requests + noise, arrivals=random.Random(2))
    assert squeezed.stats().preemptions > 0
    assert [outcome.token_ids[0] for outcome in outcomes[: len(requests)]] == alone
