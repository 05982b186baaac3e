"""The engine's Welcome, load and step times as messages of a link."""

from __future__ import annotations

from scalellm.services.executor.engine.books import EngineLoad
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.step_time import StepTimeModel
from scalellm.v1 import link_pb2


def welcome(
    engine: Engine, *, instance_id: str, model: str, tokenizer_sha256: bytes, tensor_parallel: int = 1
) -> link_pb2.Welcome:
    """Return the Welcome of an engine, which has one device per tensor-parallel rank."""
    config = engine.config
    return link_pb2.Welcome(
        instance_id=instance_id,
        model=model,
        tokenizer_sha256=tokenizer_sha256,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=config.vocab_size,
        grammars=engine.takes_grammars,
        tensor_parallel=tensor_parallel,
        devices=tensor_parallel,
    )


def load_to_wire(load: EngineLoad, draining: bool) -> link_pb2.Load:
    """Return the engine's load, without a link's credits."""
    return link_pb2.Load(
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        running=load.running,
        waiting=load.waiting,
        waiting_prefill_tokens=load.waiting_prefill_tokens,
        draining=draining,
    )


def step_time_to_wire(line: StepTimeModel) -> link_pb2.StepTime:
    """Return the model of step times as a message."""
    return link_pb2.StepTime(
        base=line.base,
        per_row=line.per_decode,
        per_prompt_token=line.per_prefill_token,
        per_context_token=line.per_context_token,
    )
