"""Published GGUF models against transformers' own loading of the same file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_oracle import load_gguf_oracle
from scalellm.services.executor.models import ModelRuntime, Quantization
from scalellm.services.executor.weights import load_model

CPU = torch.device("cpu")

# "The capital of France is", "def fibonacci(n): ...", "Once upon a time, in a small village by the sea,"
SMOLLM2_PROMPTS = [
    [504, 3575, 282, 4649, 314],
    [1604, 3987, 46477, 24, 94, 727, 472, 585, 304, 2067, 216, 34, 42, 448, 1003],
    [6403, 1980, 253, 655, 28, 281, 253, 1165, 6560, 411, 260, 3426, 28],
]
GEMMA3_PROMPTS = [
    [2, 818, 5279, 529, 7001, 563],
    [2, 2063, 10779, 78113, 236769, 236749, 1473, 107, 140, 584, 538, 655, 236743, 236778, 236787, 107, 144, 994],
    [2, 14946, 3324, 496, 990, 236764, 528, 496, 1944, 9744, 684, 506, 5442, 236764],
]


def check_logits(reference: Any, ours: Any, vocab_size: int, lengths: tuple[int, int]) -> None:
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(11))
    with torch.inference_mode():
        expected = reference(tokens[None]).logits[0]
    logits = torch.cat([ours.step({0: chunk.tolist()})[0] for chunk in tokens.split(lengths)])
    # Both are float32 sums, taken in another order; the logits reach 120.
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def check_greedy(reference: Any, ours: Any, prompts: list[list[int]]) -> None:
    """Generate greedily in one batch; the oracle, given all of it, must prefer the same token at every position."""
    texts = [list(prompt) for prompt in prompts]
    step = dict(enumerate(prompts))
    for _ in range(24):
        step = {index: [int(rows[-1].argmax())] for index, rows in ours.step(step).items()}
        for index, (token,) in step.items():
            texts[index].append(token)
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            preferred = reference(torch.tensor([text[:-1]])).logits[0].argmax(-1)
        assert text[len(prompt) :] == preferred[len(prompt) - 1 :].tolist()


@pytest.mark.slow
def test_smollm2(model_dir: Callable[[str], Path], paged: Any) -> None:
    directory = model_dir("smollm2-135m-instruct")
    reference = load_gguf_oracle(directory, 49152)
    model, config = load_model(directory, ModelRuntime())
    check_logits(reference, paged(model, config), config.vocab_size, (70, 50))
    check_greedy(reference, paged(model, config, num_sequences=3, max_tokens=64), SMOLLM2_PROMPTS)


@pytest.mark.slow
def test_gemma3(model_dir: Callable[[str], Path], paged: Any) -> None:
    directory = model_dir("gemma3-270m")
    reference = load_gguf_oracle(directory, 262144)
    model, config = load_model(directory, ModelRuntime())
    # Past the sliding window, 512 tokens.
    check_logits(reference, paged(model, config, max_tokens=640), config.vocab_size, (400, 200))
    check_greedy(reference, paged(model, config, num_sequences=3, max_tokens=64), GEMMA3_PROMPTS)


@pytest.mark.slow
def test_blocks_that_are_kept(model_dir: Callable[[str], Path], paged: Any) -> None:
    """A Q4_K_M file has four types of blocks, of which several share a matrix."""
    directory = model_dir("gemma3-270m")
    tokens = torch.randint(262144, (60,), generator=torch.Generator().manual_seed(11)).tolist()
    logits = []
    for quantization in (Quantization("none"), Quantization("keep")):
        model, config = load_model(directory, ModelRuntime(quantization=quantization), max_model_len=64)
        logits.append(paged(model, config).step({0: tokens})[0])
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=0)
