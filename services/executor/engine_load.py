"""What the engine says of itself on links: its load, and how long its steps take."""

from __future__ import annotations

from scalellm.v1 import link_pb2
from services.executor.engine.ledger import EngineLoad
from services.executor.engine.step_time import StepTimeModel


def load_to_wire(load: EngineLoad, draining: bool) -> link_pb2.Load:
    """The engine's state, without a link's credits."""
    return link_pb2.Load(
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        running=load.running,
        waiting=load.waiting,
        waiting_prefill_tokens=load.waiting_prefill_tokens,
        draining=draining,
    )


def step_time_to_wire(line: StepTimeModel) -> link_pb2.StepTime:
    """How long steps take."""
    return link_pb2.StepTime(
        base=line.base,
        per_row=line.per_decode,
        per_prompt_token=line.per_prefill_token,
        per_context_token=line.per_context_token,
    )
