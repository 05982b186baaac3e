"""Engines over models with random weights, and the requests that are put to them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.device import Device
from bench.gpu.models import PAGE, Format
from scalellm.services.executor.engine import Engine, EngineConfig, EngineRequest, SamplingParams
from scalellm.services.executor.models import CausalLM, KVCache, ModelConfig, allocate_kv_caches
from scalellm.services.executor.runner import CudaDevice, FakeCudaDevice, ModelRunner


@dataclass(frozen=True, slots=True)
class Load:
    """`seqs` requests at once, each `prompt` tokens long and answered with `output` tokens."""

    seqs: int
    prompt: int
    output: int

    @property
    def length(self) -> int:
        """Tokens of a sequence, and room for the prompts of the warm-up."""
        return self.prompt + self.output + 2

    @property
    def num_blocks(self) -> int:
        """Blocks that hold all of them."""
        return self.seqs * -(-self.length // PAGE) + 2


@dataclass(frozen=True, slots=True)
class Served:
    """The results of a run: seconds and tokens of each step, and per request its tokens and their log-probabilities."""

    steps: list[tuple[float, int]]
    answers: dict[int, list[tuple[int, float]]]

    def decode(self, seqs: int) -> tuple[int, float]:
        """Return the tokens, and seconds, between the first and the last step in which every sequence got one."""
        full = [i for i, (_, count) in enumerate(self.steps) if count == seqs]
        first, last = full[0], full[-1]
        return sum(count for _, count in self.steps[first + 1 : last + 1]), self.steps[last][0] - self.steps[first][0]


def engine_config(config: ModelConfig, load: Load, *, batched_tokens: int) -> EngineConfig:
    """Return limits that admit all requests of the load at once."""
    return EngineConfig(
        num_blocks=load.num_blocks,
        max_model_len=load.length,
        vocab_size=config.vocab_size,
        eos_token_ids=frozenset(config.eos_token_ids),
        block_size=PAGE,
        max_num_seqs=load.seqs,
        max_num_batched_tokens=max(batched_tokens, load.seqs),
        enable_prefix_cache=False,
        max_logprobs=1,
    )


def make_runner(
    model: CausalLM, limits: EngineConfig, form: Format, device: Device, *, graphs: bool = True
) -> ModelRunner:
    """Return the runner that serves, on this device or on what stands for one in a dry run."""
    return ModelRunner(model, kv_caches(model, limits, form, device), limits, runner_device(device, graphs=graphs))


def runner_device(device: Device, *, graphs: bool) -> Any:
    """Return the device of a runner: this one, or what stands for one in a dry run."""
    if not device.dry_run:
        return CudaDevice(device.target.index, has_graphs=graphs)
    fake = FakeCudaDevice(device.capability)
    fake.has_graphs = graphs
    return fake


def kv_caches(model: CausalLM, limits: EngineConfig, form: Format, device: Device) -> list[KVCache]:
    """Return the cache of a model, or of the share of it that a rank holds."""
    return allocate_kv_caches(
        model.rank_config,
        limits.num_blocks,
        limits.block_size,
        dtype=form.cache_dtype,
        device=device.target,
        ops=model.runtime.ops,
    )


def serve(engine: Engine, load: Load, vocab: int, *, temperature: float, logprobs: int | None = None) -> Served:
    """Put all requests at once and return when all are answered. Raises what a step raised."""
    ids = torch.randint(0, vocab, (load.seqs, load.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    for number, prompt in enumerate(ids):
        sampling = SamplingParams(
            max_tokens=load.output, temperature=temperature, ignore_eos=True, seed=number, logprobs=logprobs
        )
        engine.add(EngineRequest((0, number), str(number), tuple(prompt), sampling))
    served = Served([], {number: [] for number in range(load.seqs)})
    begun = time.perf_counter()
    while engine.has_unfinished():
        result = engine.step()
        if result.error is not None:
            raise result.error
        served.steps.append((time.perf_counter() - begun, sum(len(output.token_ids) for output in result.tokens)))
        for output in result.tokens:
            logprobs_of = output.logprobs or [0.0] * len(output.token_ids)
            served.answers[output.key[1]] += zip(output.token_ids, logprobs_of, strict=True)
    return served
