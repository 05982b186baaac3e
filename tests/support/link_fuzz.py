"""Frames played to each end of the links, without processes: what must hold whatever they say.

Each function plays one example and checks that nothing is raised but StatusError where the frame came in, that a
neighbour's request is served, and that afterwards books balance and nothing is left. They return how often what
happened.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import engine_kit
from fake_scheduler_link import unconnected
from link_frames import HELLO, WELCOME
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link.client_frames import check_submit, parse_client_frame
from scalellm.services.common.link.server_frames import read_step, read_welcome
from scalellm.services.common.tracing.tracer import Tracer
from scalellm.services.executor.build import LoadedEngine
from scalellm.services.executor.engine import Engine
from scalellm.services.executor.engine_process import EngineLoop
from scalellm.services.executor.ipc import Kind, Message
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.client_link import ClientLink
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.dispatcher import Dispatcher
from scalellm.services.scheduler.dispatchers import Dispatchers
from scalellm.services.scheduler.replica_link import ReplicaLink
from scalellm.services.scheduler.service import SchedulerService, _on_frame
from scalellm.services.tokenizer.generation.grpc_face import to_wire
from scalellm.services.tokenizer.latency import LatencyTrace, server_timing
from scalellm.services.tokenizer.sample_stream import OutputOptions, SampleStream
from scalellm.services.tokenizer.schedulers import Schedulers
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.stop_strings import StopStrings
from scalellm.v1 import common_pb2, executor_pb2, link_pb2

_NEIGHBOUR = link_pb2.ClientFrame(
    submit=link_pb2.Submit(handle=77, token_ids=[1, 2], sampling=common_pb2.SamplingParams(max_tokens=2, seed=1))
)
_VICTIM, _OTHER = 1, 2
_MAX_STEPS = 500


class _Faults(logging.Handler):
    """Notes what was logged with a traceback: no service raises what it does not mean to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.seen.append(self.format(record))


@contextmanager
def _without_faults() -> Iterator[None]:
    handler, logger = _Faults(), logging.getLogger("scalellm.services")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not handler.seen, handler.seen[0]


def make_tracer() -> Tracer:
    """Return a tracer of what is sampled, which exports nothing."""
    return Tracer("fuzz", SimpleNamespace(trace_file=None, otlp_endpoint=None), 0.0)  # type: ignore[arg-type]


@_without_faults()
def play_to_engine(frames: Sequence[link_pb2.ClientFrame]) -> Counter[str]:
    """A scheduler's frames, and the engine process that takes them."""
    config = engine_kit.make_config()
    clock = engine_kit.SimClock()
    engine = Engine(config, engine_kit.FakePagedRunner(config, on_execute=lambda batch: clock.advance(0.1)), clock)
    sent: list[Message] = []
    channel = SimpleNamespace(send=lambda *messages: sent.extend(messages))
    info = executor_pb2.GetExecutorInfoResponse()
    loop = EngineLoop(LoadedEngine(engine, WELCOME, info), channel, clock, is_tracing=True)  # type: ignore[arg-type]
    for link in (_VICTIM, _OTHER):
        loop._handle(Message(Kind.OPEN, link, HELLO.SerializeToString()))
    loop._handle(Message(Kind.FRAME, _OTHER, _NEIGHBOUR.SerializeToString()))
    num_submits = 0
    for frame in frames:
        loop._handle(Message(Kind.FRAME, _VICTIM, frame.SerializeToString()))
        num_submits += frame.HasField("submit")
        if engine.has_unfinished():
            loop._step()
    for _ in range(_MAX_STEPS):
        if not engine.has_unfinished():
            break
        loop._step()
    loop._announce_load(loop._links.values())
    loop._send_stats()
    engine.check_integrity()
    load = engine.load()
    assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.total_blocks)
    finished = {link: _finishes(sent, link) for link in (_VICTIM, _OTHER)}
    assert [finish.status.code for finish in finished[_OTHER]] == [0]
    stats = executor_pb2.GetExecutorInfoResponse.FromString([m for m in sent if m.kind is Kind.STATS][-1].payload)
    assert stats.accepted == stats.finished + stats.cancelled + stats.rejected
    is_cut = any(message.kind is Kind.REFUSE and message.link == _VICTIM for message in sent)
    if not is_cut:
        assert len(finished[_VICTIM]) == num_submits
        victim = loop._links[_VICTIM]  # whose share is another one once a renewal has told of its queue
        assert victim.load(False).granted_requests == victim._request_share + num_submits
    outcomes = Counter(str(finish.status.code) for finish in finished[_VICTIM])
    return outcomes + Counter({"link cut": int(is_cut)})


def _finishes(sent: Sequence[Message], link: int) -> list[link_pb2.Finish]:
    frames = [message.payload for message in sent if message.kind is Kind.FRAME and message.link == link]
    return [finish for frame in frames for finish in link_pb2.ServerFrame.FromString(frame).step.finished]


@_without_faults()
def play_to_scheduler(
    frames: Sequence[link_pb2.ClientFrame], steps: Sequence[link_pb2.StepOutput], tracer: Tracer | None = None
) -> Counter[str]:
    """A worker's frames and an executor's, and the scheduler between them."""
    return asyncio.run(_play_to_scheduler(frames, steps, tracer))


async def _play_to_scheduler(
    frames: Sequence[link_pb2.ClientFrame], steps: Sequence[link_pb2.StepOutput], tracer: Tracer | None
) -> Counter[str]:
    affinity = AffinityStore(None, 60.0)
    dispatchers = Dispatchers(lambda: Dispatcher(SchedulerSettings(stall_limit_s=1000.0), "fuzz", affinity, tracer))
    dispatcher, *_ = dispatchers
    fleet, placement, intake = dispatcher.fleet, dispatcher.placement, dispatcher.intake
    service = SchedulerService("fuzz", 1.0, dispatchers, SimpleNamespace(errors={}), affinity, 30.0)  # type: ignore[arg-type]
    replica = ReplicaLink("fuzz:1", link_pb2.Hello(), placement, 1000.0)
    passed_on: list[link_pb2.Submit] = []
    replica._client.submit = passed_on.append  # type: ignore[method-assign]
    fleet.replicas[replica.address] = replica
    dispatchers.start()
    welcome = read_welcome(link_pb2.ServerFrame(welcome=WELCOME).SerializeToString())
    replica.on_up(welcome)
    victim, other = (ClientLink(name, placement.books) for name in ("victim", "other"))
    outcomes: Counter[str] = Counter()
    for link in (victim, other):
        intake.open_link(link)
    for frame in frames:
        try:
            _on_frame(intake, victim, parse_client_frame(frame.SerializeToString()))
        except StatusError:
            outcomes["client link cut"] += 1
            break
    _on_frame(intake, other, parse_client_frame(_NEIGHBOUR.SerializeToString()))
    await _turns()
    assert not other.requests or other.requests[77].executor.replica is replica, "the neighbour's request was not sent"
    for submit in passed_on:
        check_submit(submit)
        submit.SerializeToString()
    for step in steps:
        try:
            replica.on_step(read_step(link_pb2.ServerFrame(step=step).SerializeToString(), welcome.vocab_size))
        except StatusError as error:
            outcomes["executor link cut"] += 1
            replica.on_down(error)
            replica.on_up(welcome)
        await _turns()
        service.get_state().SerializeToString()
    if outcomes["client link cut"]:
        intake.close_link(victim)
    for _ in range(_MAX_STEPS):
        if not placement.books.num_open:
            break
        # Whatever was said of credits: a new incarnation, which ends all that it gets.
        replica.on_down(StatusError.unavailable("gone"))
        replica.on_up(welcome)
        await _turns()
        replica.on_step(link_pb2.StepOutput(finished=[link_pb2.Finish(handle=handle) for handle in replica.running]))
        await _turns()
    books = placement.books
    assert not books.num_open
    assert (len(placement.queue), replica.running, victim.requests, other.requests) == (0, {}, {}, {})
    assert books.tokens_received == books.tokens_sent + books.tokens_dropped
    outcomes.update({f"code {code}": count for code, count in books.ended.items() if count})
    for link in (victim, other):
        intake.close_link(link)
    await dispatchers.stop()
    return outcomes


async def _turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


@_without_faults()
def play_to_worker(steps: Sequence[link_pb2.StepOutput], texts: TokenTexts) -> Counter[str]:
    """A scheduler's frames, and the tokenizer worker that takes them."""
    return asyncio.run(_play_to_worker(steps, texts))


async def _play_to_worker(steps: Sequence[link_pb2.StepOutput], texts: TokenTexts) -> Counter[str]:
    with unconnected():
        schedulers = Schedulers([], "fuzz", b"")
        schedulers.add("fuzz:1", "fuzz")
    (link,) = schedulers._links.values()
    link.on_up(WELCOME)
    prompt = [1, 2]
    options = OutputOptions(token_ids=True, logprobs=True)
    requests = []
    for num_samples in (1, 2, 3):
        sampling = common_pb2.SamplingParams(n=num_samples, logprobs=1)
        receiver = schedulers.submit(link_pb2.Submit(token_ids=prompt, sampling=sampling))
        streams = [SampleStream(index, options, texts, StopStrings(["x"])) for index in range(num_samples)]
        requests.append((receiver, streams, LatencyTrace()))
    outcomes: Counter[str] = Counter()
    for step in steps:
        try:
            link.on_step(read_step(link_pb2.ServerFrame(step=step).SerializeToString(), WELCOME.vocab_size))
        except StatusError as error:
            outcomes["link cut"] += 1
            link.on_down(error)
            link.on_up(WELCOME)
            await asyncio.sleep(0)
        for receiver, streams, trace in requests:
            try:
                for batch in receiver.take():
                    if (delta := streams[batch.index].push(batch)) is not None:
                        to_wire(delta).SerializeToString()
                if receiver.finish is not None:
                    status = StatusError.from_link(receiver.finish.status)
                    status.to_rpc_status()
                    latency = trace.breakdown(receiver.finish.timings)
                    assert len(server_timing(latency, receiver.finish.usage).encode("ascii")) < 4096
                    outcomes[f"code {receiver.finish.status.code}"] += 1
            except StatusError:
                outcomes["request failed"] += 1
    link.on_down(StatusError.unavailable("gone"))
    assert schedulers.num_handles == 0
    for receiver, _, _ in requests:
        assert receiver.is_over or receiver in schedulers._requests
        schedulers.release(receiver, link_pb2.ABORT_REASON_CANCELLED)
    assert not schedulers._requests
    assert schedulers.num_waiting == 0
    return outcomes
