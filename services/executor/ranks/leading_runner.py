"""The model runner of rank 0, which has all other ranks do the same work."""

from __future__ import annotations

from collections.abc import Callable

from scalellm.services.executor.engine.batch import ScheduledBatch
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.models import CausalLM, KVCache
from scalellm.services.executor.ranks.plan_writer import PlanWriter, block_pairs
from scalellm.services.executor.ranks.told_masks import TellingMasks
from scalellm.services.executor.runner import Device, ModelRunner
from scalellm.services.executor.runner.model_runner import InFlightStep
from scalellm.v1 import ranks_pb2


class RanksApartError(Exception):
    """A step failed on this rank, or another rank is gone. The state of the others is unknown, so the group
    must end.
    """


class LeadingRunner(ModelRunner):
    """Sends a plan to the other ranks before it does its own part of the work, which contains sums over all ranks.

    The others never answer, because this rank computes the same results. A step that fails here ends the group, by way
    of `check_device`.

    Args:
        model: This rank's share.
        kv_caches: As `ModelRunner` takes them.
        config: As `ModelRunner` takes it.
        device: Device of this rank.
        tell: Sends a plan to all other ranks. Raises RanksApartError if one of them is gone.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_caches: list[KVCache],
        config: EngineConfig,
        device: Device,
        tell: Callable[[ranks_pb2.RankPlan], None],
    ) -> None:
        self._telling_masks = TellingMasks(config.max_num_seqs, config.vocab_size, tell)
        super().__init__(model, kv_caches, config, device, masks=self._telling_masks)
        self._tell = tell
        self._writer = PlanWriter()

    def check_device(self) -> None:
        """Raise RanksApartError after a failed step, because the other ranks may be waiting within that step."""
        super().check_device()
        raise RanksApartError("a step failed on one of several ranks")

    def capture_graphs(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Run and capture the decode steps on all ranks."""
        self._tell(ranks_pb2.RankPlan(capture=ranks_pb2.RankCapture()))
        super().capture_graphs(on_progress)

    def seal(self) -> None:
        """End the warm-up on all ranks."""
        self._tell(ranks_pb2.RankPlan(seal=ranks_pb2.RankSeal()))
        super().seal()

    def swap(self, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        """Copy blocks to the hosts' memory and back on all ranks."""
        swap = ranks_pb2.RankSwap(outs=block_pairs(outs), ins=block_pairs(ins))
        self._tell(ranks_pb2.RankPlan(swap=swap))
        super().swap(outs, ins)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks on all ranks."""
        self._tell(ranks_pb2.RankPlan(copies=block_pairs(pairs)))
        super().copy_blocks(pairs)

    def launch(self, batch: ScheduledBatch) -> InFlightStep:
        """Start a step on all ranks."""
        step = self._writer.step(batch)
        self._telling_masks.is_awaited = step.masked
        self._tell(ranks_pb2.RankPlan(step=step))
        return super().launch(batch)
