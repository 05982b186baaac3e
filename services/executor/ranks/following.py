"""The loop of ranks other than 0, which carry out rank 0's plans in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.ranks.plan_reader import PlanReader
from scalellm.services.executor.ranks.told_masks import ToldMasks
from scalellm.services.executor.runner import ModelRunner
from scalellm.services.executor.runner.model_runner import InFlightStep
from scalellm.v1 import ranks_pb2

_MOST_IN_FLIGHT = 1  # in addition to the step that is being launched, as on rank 0


def follow(plans: Iterable[ranks_pb2.RankPlan], runner: ModelRunner, masks: ToldMasks, config: EngineConfig) -> None:
    """Carry out plans until they end. Raises what the runner raises, which ends the rank and with it the group.

    Args:
        plans: Those of rank 0.
        runner: This rank's, with `masks`.
        masks: Memory for the masks that the leading rank sends.
        config: Rank 0's.
    """
    reader = PlanReader(config)
    in_flight: deque[InFlightStep] = deque()
    for plan in plans:
        match plan.WhichOneof("plan"):
            case "step":
                in_flight.append(runner.launch(reader.step(plan.step)))
                while len(in_flight) > _MOST_IN_FLIGHT:
                    in_flight.popleft().wait()
            case "masks":
                masks.take(plan.masks)
                in_flight[-1].draw()
            case "copies":
                runner.copy_blocks(_pairs(plan.copies))
            case "swap":
                runner.swap(_pairs(plan.swap.outs), _pairs(plan.swap.ins))
            case "capture":
                runner.capture_graphs()
            case "seal":
                runner.seal()
            case other:
                raise AssertionError(f"rank 0 sent a plan of {other}")


def _pairs(pairs: ranks_pb2.BlockPairs) -> list[tuple[int, int]]:
    return list(zip(pairs.sources, pairs.targets, strict=True))
