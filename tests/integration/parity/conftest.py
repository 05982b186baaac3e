"""Engines on real weights, and transformers on the same weights as the oracle."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gguf_oracle import load_gguf_oracle
from scalellm.kernels import Capability, select_ops
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.request import EngineRequest, RequestFinish, RequestStatus
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.executor.models import CausalLM, ModelConfig, ModelRuntime, allocate_kv_caches
from scalellm.services.executor.runner import CpuDevice, ModelRunner
from scalellm.services.executor.weights import load_model

CPU = torch.device("cpu")


@dataclass
class Outcome:
    """Results of the engine for one request."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    finish: RequestFinish | None = None


@dataclass
class LoadedModel:
    """A model of ours and the same model of transformers."""

    model: CausalLM
    config: ModelConfig
    oracle: PreTrainedModel

    def engine(self, **settings) -> Engine:
        defaults = {"num_blocks": 512, "max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 256}
        config = EngineConfig(
            vocab_size=self.config.vocab_size,
            eos_token_ids=frozenset(self.config.eos_token_ids),
            **{**defaults, **settings},
        )
        caches = allocate_kv_caches(
            self.config,
            config.num_blocks,
            config.block_size,
            dtype=torch.float32,
            device=CPU,
            ops=self.model.runtime.ops,
        )
        return Engine(config, ModelRunner(self.model, caches, config, CpuDevice()))

    @torch.inference_mode()
    def logprobs(self, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """The oracle's log-probabilities `[len(prompt + output), V]` after each token."""
        ids = torch.tensor([[*prompt, *output]])
        return torch.log_softmax(self.oracle(input_ids=ids).logits[0].float(), dim=-1)

    @torch.inference_mode()
    def assert_greedy(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Each output token is what transformers would have chosen after the tokens before it: by induction, the
        whole output is transformers' greedy output."""
        ids = torch.tensor([[*prompt, *output]])
        logits = self.oracle(input_ids=ids, logits_to_keep=len(output) + 1).logits[0]
        assert list(output) == logits.argmax(-1)[:-1].tolist()


def run(
    engine: Engine, requests: Sequence[tuple[Sequence[int], SamplingParams]], *, arrivals: random.Random | None = None
) -> list[Outcome]:
    """Run requests to their end: all at once, or arriving at random steps."""
    outcomes = [Outcome() for _ in requests]
    waiting = list(range(len(requests)))
    if arrivals is not None:
        arrivals.shuffle(waiting)
    while waiting or engine.has_unfinished():
        num_new = len(waiting) if arrivals is None else min(len(waiting), arrivals.choice((0, 0, 1, 1, 2, 5)))
        for number in itertools.islice(list(waiting), num_new):
            prompt, sampling = requests[number]
            engine.add(EngineRequest((0, number), str(number), tuple(prompt), sampling))
            waiting.remove(number)
        result = engine.step()
        assert result.error is None, result.error
        for tokens in result.tokens:
            outcome = outcomes[tokens.key[1]]
            ids = outcome.token_ids.setdefault(tokens.index, [])
            assert tokens.offset == len(ids)
            ids.extend(tokens.token_ids)
            outcome.logprobs.extend(tokens.logprobs or ())
            outcome.top_logprobs.extend(tokens.top_logprobs or ())
        for part in result.prompt_logprobs:
            outcomes[part.key[1]].prompt_logprobs.extend(part.logprobs)
        for finish in result.finished:
            outcomes[finish.key[1]].finish = finish
        engine.check_integrity()
    assert all(outcome.finish is not None and outcome.finish.status is RequestStatus.OK for outcome in outcomes)
    assert engine.load().free_blocks == engine.load().total_blocks
    return outcomes


@pytest.fixture(scope="session")
def run_engine() -> Callable[..., list[Outcome]]:
    torch.set_num_threads(1)
    return run


@pytest.fixture(scope="module")
def load() -> Callable[[Path, bool], LoadedModel]:
    """Load a model and its oracle: from a GGUF file (transformers reads it itself) or a Hugging Face directory."""

    def load_both(path: Path, gguf: bool) -> LoadedModel:
        ops = select_ops(Capability.of(CPU), dtype=torch.float32)  # what serving chooses
        model, config = load_model(path, ModelRuntime(ops))
        if gguf:
            oracle = load_gguf_oracle(path, config.vocab_size)
        else:
            oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        return LoadedModel(model, config, oracle)

    return load_both
