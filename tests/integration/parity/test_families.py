"""Every supported family, small and random: greedy output equals transformers' token for token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from scalellm.services.executor.engine.sampling_params import SamplingParams

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LlamaConfig(**SMALL), id="llama"),
        pytest.param(MistralConfig(**SMALL, sliding_window=24), id="mistral"),
        pytest.param(Qwen2Config(**SMALL), id="qwen2"),
        pytest.param(Qwen3Config(**SMALL), id="qwen3"),
        pytest.param(MixtralConfig(**SMALL, num_local_experts=4), id="mixtral"),
        pytest.param(
            Qwen3MoeConfig(
                **SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[1]
            ),
            id="qwen3-moe",
        ),
        pytest.param(Gemma3TextConfig(**SMALL, sliding_window=24), id="gemma3"),
    ],
)
def test_small_random_models(config, load, tmp_path: Path, run_engine) -> None:
    """With windows shorter than the prompts, chunks, shared prefixes and preemption."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model = load(tmp_path, False)
    rng = random.Random(1)
    shared = [rng.randrange(3, 320) for _ in range(40)]
    prompts = [
        (shared if number % 3 == 0 else []) + [rng.randrange(3, 320) for _ in range(rng.choice((1, 15, 16, 17, 60)))]
        for number in range(24)
    ]
    requests = [(prompt, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)) for prompt in prompts]
    engine = model.engine(num_blocks=24, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=40)
    outcomes = run_engine(engine, requests, arrivals=rng)
    assert engine.stats().preemptions > 0
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        model.assert_greedy(prompt, outcome.token_ids[0])
