"""Every family against transformers: whole prompts, chunks, decode steps and mixed batches give the same logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalellm.services.executor.models import ModelRuntime
from scalellm.services.executor.weights import load_model

PROMPT_LENGTHS = (70, 1, 33)
CPU = torch.device("cpu")


def reference(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def random_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


@pytest.fixture
def models(family: str, hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path) -> tuple[Any, Any]:
    oracle = hf_model(family)
    oracle.save_pretrained(tmp_path)
    model, config = load_model(tmp_path, ModelRuntime())
    return oracle, paged(model, config, num_sequences=len(PROMPT_LENGTHS))


def test_whole_prompt(models: tuple[Any, Any]) -> None:
    oracle, ours = models
    prompts = random_prompts(oracle.config.vocab_size)
    logits = ours.step(dict(enumerate(prompts)))
    for index, prompt in enumerate(prompts):
        expected = reference(oracle, prompt)
        assert expected.abs().max() > 0.5  # a comparison of noise would prove nothing
        torch.testing.assert_close(logits[index], expected, atol=1e-4, rtol=0)


def test_chunked_prefill(models: tuple[Any, Any]) -> None:
    oracle, ours = models
    prompt = random_prompts(oracle.config.vocab_size)[0]
    chunks = [ours.step({1: prompt[a:b]})[1] for a, b in ((0, 17), (17, 18), (18, 60), (60, len(prompt)))]
    torch.testing.assert_close(torch.cat(chunks), reference(oracle, prompt), atol=1e-4, rtol=0)


def test_decode_beside_prefill(models: tuple[Any, Any]) -> None:
    oracle, ours = models
    long, single, medium = random_prompts(oracle.config.vocab_size)
    first = ours.step({0: long[:-12], 1: single})
    steps = [ours.step({0: [long[i]]})[0] for i in range(len(long) - 12, len(long) - 6)]
    mixed = [ours.step({0: [long[-6]], 2: medium[:20], 1: single}), ours.step({2: medium[20:], 0: long[-5:]})]
    got = torch.cat([first[0], *steps, mixed[0][0], mixed[1][0]])
    torch.testing.assert_close(got, reference(oracle, long), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat([mixed[0][2], mixed[1][2]]), reference(oracle, medium), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat([first[1], mixed[0][1]]), reference(oracle, single * 2), atol=1e-4, rtol=0)


def test_logits_of_the_last_tokens_alone(models: tuple[Any, Any]) -> None:
    oracle, ours = models
    long, single, medium = random_prompts(oracle.config.vocab_size)
    first = ours.step_to_last({0: long[:40], 1: single})
    then = ours.step_to_last({0: long[40:-1], 1: [7], 2: medium})
    after = ours.step({0: long[-1:], 1: [8], 2: [9]})  # reads what the two have left in the cache
    for index, got, tokens in (
        (0, first, long[:40]),
        (1, first, single),
        (0, then, long[:-1]),
        (1, then, [*single, 7]),
        (2, then, medium),
        (0, after, long),
        (1, after, [*single, 7, 8]),
        (2, after, [*medium, 9]),
    ):
        torch.testing.assert_close(got[index][-1], reference(oracle, tokens)[-1], atol=1e-4, rtol=0)
