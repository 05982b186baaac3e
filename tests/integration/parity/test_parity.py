"""Greedy output equals transformers' token for token, whatever else the engine does at the same time.

The real model is SmolLM2-135M on real prompts: four of its layers, and as a slow test all of them.
"""

from __future__ import annotations

import random

import pytest
import torch

from prompts import PROMPTS
from scalellm.services.executor.engine.config import CapacityPolicy
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.tokenizer.text.loading import load_model_tokenizer


def greedy(max_tokens: int, **more) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **more)


MAX_TOKENS = 8


@pytest.fixture(scope="module", params=["shallow", pytest.param("whole", marks=pytest.mark.slow)])
def model(request, load, model_dir, shallow_model):
    return load(shallow_model if request.param == "shallow" else model_dir("smollm2-135m-instruct"), True)


@pytest.fixture(scope="module")
def prompts(model_dir) -> list[list[int]]:
    tokenizer = load_model_tokenizer(model_dir("smollm2-135m-instruct")).tokenizer
    return [tokenizer.encode(text).ids for text in PROMPTS]


@pytest.fixture(scope="module")
def some(prompts) -> list[list[int]]:
    """Ten prompts of 1 to 263 tokens, since all of them would take minutes."""
    return [prompts[number] for number in (0, 4, 6, 8, 14, 20, 28, 30, 32, 36)]


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
        pytest.param({"max_num_batched_tokens": 48}, id="chunks-and-preemption"),
        pytest.param({"capacity_policy": CapacityPolicy.GUARANTEED_NO_EVICT}, id="guaranteed-no-evict"),
    ],
)
def test_in_random_batches(model, some, alone, run_engine, settings) -> None:
    engine = model.engine(num_blocks=22, max_model_len=288, **settings)
    requests = [(prompt, greedy(MAX_TOKENS)) for prompt in some]
    outcomes = run_engine(engine, requests, arrivals=random.Random(12))
    assert [outcome.token_ids[0] for outcome in outcomes] == alone
    assert (engine.stats().preemptions > 0) == ("capacity_policy" not in settings)


def test_prefix_hits(model, some, alone, run_engine) -> None:
    engine = model.engine()
    chosen = [number for number, prompt in enumerate(some) if len(prompt) < 100]
    requests = [(some[number], greedy(MAX_TOKENS)) for number in chosen]
    cold = run_engine(engine, requests)
    warm = run_engine(engine, requests, arrivals=random.Random(5))
    for number, first, second in zip(chosen, cold, warm, strict=True):
        prompt, expected = some[number], alone[number]
        assert first.token_ids[0] == second.token_ids[0] == expected
        assert second.finish.usage.cached_tokens == (len(prompt) - 1) // 16 * 16


def test_logprobs(model, prompts, run_engine) -> None:
    sampling = SamplingParams(max_tokens=6, temperature=0.8, seed=3, logprobs=5, prompt_logprobs=1, ignore_eos=True)
    chosen = [prompts[number] for number in (0, 4, 5, 30, 31)]
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
        (prompt, SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=40 + number, ignore_eos=True))
        for number, prompt in enumerate(chosen)
    ]
    alone = [run_engine(model.engine(), [request])[0].token_ids[0] for request in requests]
    noise = [(prompt, greedy(12)) for prompt in prompts[6:16]]
    squeezed = model.engine(num_blocks=20, max_model_len=256)
    outcomes = run_engine(squeezed, requests + noise, arrivals=random.Random(2))
    assert squeezed.stats().preemptions > 0
    assert [outcome.token_ids[0] for outcome in outcomes[: len(requests)]] == alone
