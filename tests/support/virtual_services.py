"""Small executors on virtual time, whose tokens are scripted and noted in a journal, and schedulers that fit them."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import replace

from bench.virtual.executor import StepClock, VirtualExecutor
from bench.virtual.line import VirtualEdge, VirtualScheduler
from bench.virtual.network import Network
from scalellm.services.common.link import token_runs
from scalellm.services.executor.build import LoadedEngine
from scalellm.services.executor.engine.batch import ScheduledBatch, ScheduledSequence
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.fake_model_runner import STEP_TIME_PRESETS, FakeModelRunner
from scalellm.services.executor.engine.step_time import StepTimeModel
from scalellm.services.executor.grammar import Masks
from scalellm.services.executor.ipc import Kind, Message
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.v1 import link_pb2
from shaped_answers import EOS, SIZE, CompilesAtOnce, compiler_of_masks_at_once

VOCABULARY = SIZE
SILENCE_LIMIT = 3.0
LEASE = 2.0


def script(seed: int, index: int, offset: int, previous: int) -> int:
    """Number that chooses the token of sample `index` at `offset`, modulo the number of tokens to choose from."""
    mixed = (seed * 2654435761 + index * 40503 + offset * 2246822519 + previous * 3266489917 + 374761393) % 2**32
    return mixed ^ (mixed >> 15)


def scripted_token(seed: int, index: int, offset: int, previous: int) -> int:
    """The token that sample `index` has at `offset`: no two samples, offsets or pasts have the same, but by chance."""
    return 1 + script(seed, index, offset, previous) % (VOCABULARY - 1)


class Journal:
    """All tokens that engines ever emitted, by (request id, sample, offset), and the number of times."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int, int], set[int]] = defaultdict(set)
        self.emissions = 0

    def record(self, request_id: str, index: int, offset: int, token_ids: Collection[int]) -> None:
        """An engine emitted these."""
        for place, token in enumerate(token_ids):
            self.tokens[request_id, index, offset + place].add(token)
            self.emissions += 1


class RandomSteps:
    """In place of a StepTimeModel: steps of 5 to 20 ms."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def seconds(self, batch: ScheduledBatch) -> float:
        """Drawn."""
        return self._rng.uniform(0.005, 0.02)


class ScriptedRunner(FakeModelRunner):
    """Answers by the script, after steps that take no time unless it is told otherwise."""

    def __init__(
        self,
        num_rows: int,
        clock: Callable[[], float],
        *,
        overlaps: bool,
        steps: StepTimeModel | RandomSteps = STEP_TIME_PRESETS["instant"],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        masks = Masks(num_rows, VOCABULARY)
        super().__init__(VOCABULARY, {EOS}, steps, sleep, clock, overlaps=overlaps, masks=masks)

    def number(self, previous: int, scheduled: ScheduledSequence) -> int:
        """By the sample's seed, index and offset as well."""
        seq = scheduled.seq
        return script(seq.group.request.sampling.seed or 0, seq.index, scheduled.num_output_tokens, previous)


class ScriptedExecutor(VirtualExecutor):
    """An executor that is small enough to be full."""

    config = EngineConfig(
        num_blocks=64,
        max_model_len=256,
        vocab_size=VOCABULARY,
        eos_token_ids=frozenset({EOS}),
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )

    def __init__(self, network: Network, address: str, journal: Journal, rng: random.Random) -> None:
        self._rng = rng
        self._journal = journal
        self._requests: dict[tuple[int, int], str] = {}
        super().__init__(network, address, self._new_engine, lease=LEASE, watch=self._note)

    def load(self, clock: StepClock) -> LoadedEngine:
        """The next incarnation, which may hold tokens of some steps back."""
        return replace(super().load(clock), output_interval=0.03 * (self._rng.random() < 0.5))

    def _new_engine(self, clock: StepClock) -> Engine:
        overlaps, steps = self._rng.random() < 0.5, RandomSteps(self._rng)
        runner = ScriptedRunner(self.config.max_num_seqs, clock, overlaps=overlaps, steps=steps, sleep=clock.sleep)
        return Engine(self.config, runner, clock, grammars=CompilesAtOnce(compiler_of_masks_at_once))

    def _note(self, message: Message, is_received: bool) -> None:
        if message.kind is not Kind.FRAME:
            return
        if is_received:
            frame = link_pb2.ClientFrame.FromString(message.payload)
            if frame.WhichOneof("frame") == "submit":
                self._requests[message.link, frame.submit.handle] = frame.submit.request_id
            return
        step = link_pb2.ServerFrame.FromString(message.payload).step
        for handle, index, offset, token_ids in token_runs(step):
            self._journal.record(self._requests[message.link, handle], index, offset, token_ids)


class WatchfulScheduler(VirtualScheduler):
    """A scheduler that notices within seconds what is silent."""

    def __init__(self, network: Network, address: str, executors: Collection[str], **settings: object) -> None:
        limits = {"stall_limit_s": SILENCE_LIMIT, "lease_s": LEASE}
        super().__init__(network, address, executors, SchedulerSettings(**limits | settings))


class WatchfulEdge(VirtualEdge):
    """An edge that notices within seconds what is silent."""

    def __init__(self, network: Network, name: str, schedulers: Collection[str]) -> None:
        super().__init__(network, name, schedulers, silence_limit=SILENCE_LIMIT)
