"""A fleet on virtual time: pools of executors, a scheduler before them, and edges that send to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from bench.load.records import Ended, Request, RequestError, Tokens
from bench.load.target import TargetInfo
from bench.virtual.executor import StepClock, VirtualExecutor
from bench.virtual.line import VirtualEdge, VirtualScheduler
from bench.virtual.network import Network
from scalellm.services.common.errors import StatusError, code_name
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.fake_model_runner import STEP_TIME_PRESETS, FakeModelRunner
from scalellm.services.executor.engine.step_time import StepTimeModel
from scalellm.services.executor.engine.step_warm_up import fit_step_times
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.v1 import link_pb2

VOCABULARY = 2048
"""Token ids: small, as each engine's model keeps a list of them."""

_EOS = 0
_JOIN_LIMIT = 120.0
_REST_LIMIT = 120.0
_PAUSE = 0.5


class FleetError(Exception):
    """The simulated line did what it must not do; the message says what."""


@dataclass(frozen=True)
class Pool:
    """Executors that are alike.

    Attributes:
        size: Number of executors.
        tensor_parallel: Devices of each.
        steps: Model of the time of their steps.
        overlaps: True if the next step is prepared while one runs, as on a GPU.
        max_num_seqs: Sequences that run at once.
        max_num_batched_tokens: Most tokens of a step.
        max_model_len: Longest prompt plus output.
        num_blocks: Cache blocks.
        block_size: Tokens of a block.
        measures: True if an executor measures its steps before it serves, as those with other devices than a CPU do.
    """

    size: int
    tensor_parallel: int = 1
    steps: StepTimeModel = STEP_TIME_PRESETS["h200-llama-8b"]
    overlaps: bool = True
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 16384
    num_blocks: int = 4096
    block_size: int = 64
    measures: bool = False

    def make_engine(self, clock: StepClock) -> Engine:
        """An engine of this pool."""
        config = EngineConfig(
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            vocab_size=VOCABULARY,
            eos_token_ids=frozenset({_EOS}),
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
        )
        runner = FakeModelRunner(VOCABULARY, {_EOS}, self.steps, clock.sleep, clock, overlaps=self.overlaps)
        step_times = None
        if self.measures:
            step_times = fit_step_times(config, runner, clock)
            runner = FakeModelRunner(VOCABULARY, {_EOS}, self.steps, clock.sleep, clock, overlaps=self.overlaps)
        return Engine(config, runner, clock, step_times=step_times)


@dataclass(frozen=True)
class FleetPlan:
    """The parts of a fleet.

    Attributes:
        pools: Its executors.
        num_edges: Tokenizer workers.
        latency: Seconds that a message takes from one service to the next.
        encoding: Seconds of an edge for each request, of one after the other, before it sends it on.
        settings: Settings of the scheduler beyond its defaults.
    """

    pools: tuple[Pool, ...] = (Pool(8),)
    num_edges: int = 4
    latency: float = 0.2e-3
    encoding: float = 0.0
    settings: dict[str, object] = field(default_factory=dict)


class VirtualFleet:
    """The services of a plan; a Target of bench.load. Made on a VirtualLoop."""

    takes_token_ids = True

    def __init__(self, plan: FleetPlan) -> None:
        network = Network(lambda: plan.latency)
        pools = [pool for pool in plan.pools for _ in range(pool.size)]
        self.executors = [
            VirtualExecutor(
                network,
                f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:50061",
                pool.make_engine,
                tensor_parallel=pool.tensor_parallel,
            )
            for number, pool in enumerate(pools)
        ]
        addresses = [executor.address for executor in self.executors]
        settings = SchedulerSettings.model_validate(plan.settings)
        self.scheduler = VirtualScheduler(network, "10.255.0.1:50052", addresses, settings)
        self._edges = [VirtualEdge(network, f"edge {n}", [self.scheduler.address]) for n in range(plan.num_edges)]
        self._turns = cycle([(edge.link, asyncio.Lock()) for edge in self._edges])
        self._encoding = plan.encoding
        self._script = FakeModelRunner(VOCABULARY, {_EOS}, STEP_TIME_PRESETS["instant"])
        self._num_sent = 0

    async def join(self) -> None:
        """Wait until every executor is ready."""
        ready = self.scheduler.fleet.ready
        for _ in range(round(_JOIN_LIMIT / _PAUSE)):
            if len(ready) == len(self.executors):
                break
            await asyncio.sleep(_PAUSE)
        else:
            raise FleetError(f"only {len(ready)} of {len(self.executors)} executors are ready")
        for edge in self._edges:
            await edge.link.wait_up(_JOIN_LIMIT)

    # What bench.load's driver needs of a target.

    async def info(self) -> TargetInfo:
        """See Target."""
        return TargetInfo("virtual", vocab_size=VOCABULARY)

    async def connect(self, num_streams: int) -> None:
        """See Target: the links are up."""

    async def close(self) -> None:
        """See Target: all ends with the loop."""

    async def stream(self, request: Request) -> AsyncGenerator[Tokens | Ended]:
        """See Target. Raises FleetError for a token that is not the next one of this prompt."""
        link, encoder = next(self._turns)
        self._num_sent += 1
        number = self._num_sent
        if self._encoding:
            async with encoder:
                await asyncio.sleep(self._encoding)
        submit = link_pb2.Submit(
            request_id=str(number),
            token_ids=request.token_ids,
            cache_salt=b"fleet",
            session_id=request.session_id or "",
        )
        submit.sampling.n = 1
        submit.sampling.max_tokens = request.output_len
        submit.sampling.ignore_eos = True
        submit.sampling.seed = number
        last, position = request.token_ids[-1], len(request.token_ids)
        try:
            receiver = link.submit(submit)
        except StatusError as error:
            raise RequestError(error.code.name, error.message) from None
        try:
            while receiver.finish is None or receiver.has_more:
                await receiver.wait()
                for batch in receiver.take():
                    for token in batch.token_ids:
                        if token != (due := self._script.next_token(last, position)):
                            raise FleetError(f"request {submit.request_id}: token {position} is {token}, not {due}")
                        last, position = token, position + 1
                    if batch.token_ids:
                        yield Tokens(len(batch.token_ids))
        except StatusError as error:
            raise FleetError(f"request {submit.request_id}: {error.message}") from None
        finally:
            link.release(receiver, link_pb2.ABORT_REASON_CANCELLED)
        finish = receiver.finish
        if finish.status.code:
            raise RequestError(code_name(finish.status.code), finish.status.message)
        usage = finish.usage
        yield Ended(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)

    # What happens to it.

    def busiest(self) -> VirtualExecutor | None:
        """The executor that is there and has most requests."""
        alive = [executor for executor in self.executors if executor.process.is_alive]
        alive = [executor for executor in alive if not executor.front.is_draining]
        return max(alive, key=lambda executor: executor.front.engine.engine.load().running, default=None)

    async def kill(self, executor: VirtualExecutor, seconds: float) -> None:
        """An executor dies at once, and another one comes in its place after some seconds."""
        executor.die()
        await asyncio.sleep(seconds)
        executor.start()

    async def drain(self, executor: VirtualExecutor, limit: float, seconds: float) -> None:
        """An executor leaves in order, and another one comes in its place after some seconds."""
        await executor.leave(limit)
        await asyncio.sleep(seconds)
        executor.start()

    async def rest(self) -> None:
        """Wait until nothing runs. Raises FleetError where something is held, or books do not add up."""
        loop = asyncio.get_running_loop()
        limit = loop.time() + _REST_LIMIT
        while problems := self._problems():
            if loop.time() > limit:
                raise FleetError("; ".join(problems[:5]))
            await asyncio.sleep(_PAUSE)

    def _problems(self) -> Sequence[str]:
        found = []
        for executor in self.executors:
            engine = executor.front.engine.engine
            load = engine.load()
            if engine.has_unfinished() or load.free_blocks != load.total_blocks:
                found.append(f"{executor.address} holds requests or blocks: {load}")
        placement = self.scheduler.placement
        if placement.books.num_open or placement.queue or self.scheduler.fleet.num_running:
            found.append(f"the scheduler holds requests: {placement.books}")
        return found
