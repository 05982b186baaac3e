"""OpenVINO GenAI's continuous batching as an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

from bench.peers.servers.stepping import Job, Output


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the pipeline; see its SchedulerConfig.

    Attributes:
        model: A .gguf file.
        threads: Threads of its inference.
        max_num_seqs: Requests that run at once.
        max_num_batched_tokens: Most tokens of a step.
        cache_size: Cache size of keys and values, in GB.
        eos_token_ids: Tokens that end answers.
    """

    model: Path
    threads: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cache_size: int
    eos_token_ids: frozenset[int]


class OpenVinoEngine:
    """See Engine. Computed prompts are kept as long as there is room."""

    def __init__(self, options: Options) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = options.max_num_seqs
        scheduler.max_num_batched_tokens = options.max_num_batched_tokens
        scheduler.cache_size = options.cache_size
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": options.threads}
        self._pipeline = genai.ContinuousBatchingPipeline(str(options.model), scheduler, "CPU", properties)
        self._eos_token_ids = set(options.eos_token_ids)
        self._handles: dict[int, genai.GenerationHandle] = {}

    def add(self, job: Job) -> None:
        """See Engine."""
        config = genai.GenerationConfig()
        config.max_new_tokens = job.max_tokens
        config.ignore_eos = job.ignore_eos
        config.stop_token_ids = set() if job.ignore_eos else self._eos_token_ids
        input_ids = ov.Tensor(np.asarray([job.prompt], dtype=np.int64))
        self._handles[job.number] = self._pipeline.add_request(job.number, input_ids, config)

    def cancel(self, number: int) -> None:
        """See Engine."""
        if number in self._handles:
            self._handles.pop(number).cancel()

    def has_work(self) -> bool:
        """See Engine."""
        return bool(self._pipeline.has_non_finished_requests())

    def step(self) -> list[Output]:
        """See Engine."""
        self._pipeline.step()
        outputs = []
        for number, handle in list(self._handles.items()):
            token_ids: list[int] = []
            while handle.can_read():
                for output in handle.read().values():
                    token_ids += output.generated_ids
            is_last = handle.get_status() != genai.GenerationStatus.RUNNING
            if is_last:
                del self._handles[number]
            if token_ids or is_last:
                outputs.append(Output(number, token_ids, is_last))
        return outputs
