"""The engine process's loop, driven through its socket, on a clock that every step moves."""

from __future__ import annotations

import socket

import pytest

import engine_kit
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import API_MINOR
from scalellm.services.common.link.server_frames import read_step
from scalellm.services.executor.build import LoadedEngine
from scalellm.services.executor.engine import Engine, LinkResult, TokenLogprobs
from scalellm.services.executor.engine.sampling_params import InvalidRequestError
from scalellm.services.executor.engine.speculation import Speculator, SuffixDrafter
from scalellm.services.executor.engine_link import EngineLink, sampling_from_wire
from scalellm.services.executor.engine_process import EngineLoop
from scalellm.services.executor.frame_window import WINDOW, frame_cost
from scalellm.services.executor.ipc import EngineChannel, Kind, Message
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import common_pb2, executor_pb2, link_pb2
from speculation_kit import TakesAll


def run_loop(sent: list[Message], seconds_per_step: float, num_steps: int) -> list[Message]:
    """Return the engine's answers to messages within a number of steps, after which its front goes away."""
    config = engine_kit.make_config(max_model_len=1024, num_blocks=256, max_num_batched_tokens=8)
    clock = engine_kit.SimClock()
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def on_execute(batch: object) -> None:
            clock.advance(seconds_per_step)
            if len(runner.batches) == num_steps:
                ours.shutdown(socket.SHUT_WR)

        runner = engine_kit.FakePagedRunner(config, on_execute=on_execute)
        loaded = LoadedEngine(Engine(config, runner, clock), link_pb2.Welcome(), executor_pb2.GetExecutorInfoResponse())
        ours.sendall(b"".join(message.encode() for message in sent))
        with pytest.raises(EOFError):
            EngineLoop(loaded, EngineChannel(theirs), clock).run()
        return list(EngineChannel(ours).receive(0.0))


HELLO = link_pb2.ClientFrame(hello=link_pb2.Hello(api_minor=API_MINOR)).SerializeToString()


def frame(**kind: object) -> bytes:
    return link_pb2.ClientFrame(**kind).SerializeToString()


def test_a_long_prompt_is_not_mistaken_for_a_dead_engine() -> None:
    """The scheduler takes an executor with work for dead when it is silent, and a long prompt has nothing to say."""
    prompt = [i % 5 for i in range(800)]
    submit = link_pb2.Submit(handle=1, token_ids=prompt, sampling=common_pb2.SamplingParams(max_tokens=4))
    messages = run_loop(
        [
            Message(Kind.OPEN, 1, HELLO),
            Message(Kind.OPEN, 2, HELLO),
            Message(Kind.FRAME, 1, frame(submit=submit)),
        ],
        seconds_per_step=1.0,
        num_steps=50,
    )
    frames = [message for message in messages if message.kind is Kind.FRAME]
    steps = [link_pb2.ServerFrame.FromString(message.payload).step for message in frames if message.link == 1]
    assert len(steps) >= 50
    assert not any(step.handles or step.finished for step in steps)
    assert len([message for message in frames if message.link == 2]) < 5  # who waits for nothing hears of changes only


def test_credits_of_the_prompts_in_a_step_are_granted_before_it_runs() -> None:
    """Granted after it, they would bring prompts for the next step but one."""
    config = engine_kit.make_config(max_num_batched_tokens=8)
    clock = engine_kit.SimClock()
    ours, theirs = socket.socketpair()
    granted: list[list[int]] = []
    with ours, theirs:
        received = EngineChannel(ours)

        def on_execute(batch: object) -> None:
            frames = [message.payload for message in received.receive(0.0) if message.kind is Kind.FRAME]
            loads = [link_pb2.ServerFrame.FromString(payload).step.load for payload in frames]
            granted.append([load.granted_prefill_tokens for load in loads])
            if len(granted) == 3:
                ours.shutdown(socket.SHUT_WR)

        runner = engine_kit.FakePagedRunner(config, on_execute=on_execute)
        loaded = LoadedEngine(Engine(config, runner, clock), link_pb2.Welcome(), executor_pb2.GetExecutorInfoResponse())
        sampling = common_pb2.SamplingParams(max_tokens=9, ignore_eos=True)
        submits = [link_pb2.Submit(handle=n, token_ids=[n] * 5, sampling=sampling) for n in (1, 2)]
        sent = [Message(Kind.OPEN, 1, HELLO), *(Message(Kind.FRAME, 1, frame(submit=submit)) for submit in submits)]
        ours.sendall(b"".join(message.encode() for message in sent))
        with pytest.raises(EOFError):
            EngineLoop(loaded, EngineChannel(theirs), clock).run()
    # Both prompts begin with the first step, so the loads of later steps, sent after them, grant the same.
    assert [counts[-1] for counts in granted] == [18, 18, 18]
    assert [len(counts) for counts in granted] == [1, 1, 1]


def test_the_front_is_told_of_the_frames_of_each_link_that_were_taken_in() -> None:
    sampling = common_pb2.SamplingParams(max_tokens=2, ignore_eos=True)
    submit = frame(submit=link_pb2.Submit(handle=1, token_ids=[1], sampling=sampling))
    renewal = frame(renewal=link_pb2.Renewal())
    messages = run_loop(
        [
            *(Message(Kind.OPEN, link, HELLO) for link in (1, 2)),
            *[Message(Kind.FRAME, 1, renewal)] * 300,
            Message(Kind.FRAME, 2, submit),
        ],
        seconds_per_step=1.0,
        num_steps=2,
    )
    told = [(message.link, int(message.payload)) for message in messages if message.kind is Kind.TAKEN]
    assert [link for link, _ in told] == [1, 1]
    assert 300 * frame_cost(renewal) - WINDOW / 2 < sum(cost for _, cost in told) <= 300 * frame_cost(renewal)


def test_a_link_that_was_told_of_a_step_is_not_told_its_load_again() -> None:
    sampling = common_pb2.SamplingParams(max_tokens=100, ignore_eos=True)
    submit = link_pb2.Submit(handle=1, token_ids=[1, 2, 3], sampling=sampling)
    messages = run_loop(
        [
            Message(Kind.OPEN, 1, HELLO),
            Message(Kind.FRAME, 1, frame(submit=submit)),
        ],
        seconds_per_step=1.0,
        num_steps=20,
    )
    frames = [link_pb2.ServerFrame.FromString(message.payload) for message in messages if message.kind is Kind.FRAME]
    assert sum(len(frame.step.token_ids) for frame in frames) >= 15
    assert len([frame for frame in frames if not frame.step.handles]) <= 1  # before the first step


def test_entries_of_logit_bias_are_counted_before_they_are_a_mapping() -> None:
    """Keys of one's choice, all the same one here, cost what a hash table of them costs."""
    sampling = common_pb2.SamplingParams(logit_bias=[common_pb2.LogitBias(token_id=1)] * 1025)
    with pytest.raises(InvalidRequestError, match="logit_bias: must have at most 1024 entries, got 1025"):
        sampling_from_wire(sampling)
    assert sampling_from_wire(common_pb2.SamplingParams(logit_bias=sampling.logit_bias[:1024])).logit_bias == {1: 0.0}


def test_a_request_gets_the_row_and_the_credits_of_the_one_in_whose_place_it_comes() -> None:
    """Another one waits, which would take the row if a step came between the end of the one and the other's Submit."""
    config = engine_kit.make_config(max_num_seqs=1)
    engine = Engine(config, engine_kit.FakePagedRunner(config), engine_kit.SimClock())
    link = EngineLink(1, engine)
    link.grant(2, 4)

    def submit(handle: int, **fields: object) -> bytes:
        sampling = common_pb2.SamplingParams(max_tokens=8, seed=1)
        return frame(submit=link_pb2.Submit(handle=handle, token_ids=[1, 2, 3, 4], sampling=sampling, **fields))

    assert link.on_frame(submit(7), 0.0, False) is None
    assert link.on_frame(submit(6), 0.0, False) is None
    engine.step()
    with pytest.raises(StatusError, match="granted_requests: 2 requests came"):
        link.on_frame(submit(5), 0.0, False)
    unknown = 99
    assert link.on_frame(submit(8, in_place_of=[7, unknown], priority=-1), 0.0, False) is None
    (step,) = [read_step(message, 100) for message in link.step_frames(engine.step().links[link.link], False)]
    assert [(finish.handle, finish.moved, finish.status.code) for finish in step.finished] == [(7, True, 14)]
    assert not step.finished_samples
    assert list(step.handles) == [8]
    assert (step.load.granted_requests, step.load.granted_prefill_tokens) == (3, 12)


@pytest.mark.parametrize("num_top", [0, 20])
def test_a_step_with_many_log_probabilities_is_divided_into_frames(num_top: int) -> None:
    """A step of prompts with 100,000 tokens and 20 alternatives each would be one frame beyond what a link carries."""
    config = engine_kit.make_config(max_model_len=1024, num_blocks=256)
    link = EngineLink(1, Engine(config, engine_kit.FakePagedRunner(config)))
    count = 20_000
    logprobs = [-1 - i / 7 for i in range(count)]
    top = [[(2**20 - 1, -0.5 - place) for place in range(num_top)]] * count
    neighbour = TokenLogprobs((1, 8), 0, 3, [-1.0, -2.0], [[], []], 0)
    result = LinkResult(
        handles=[8],
        indices=[0],
        offsets=[0],
        counts=[1],
        token_ids=[5],
        prompt_logprobs=[TokenLogprobs((1, 9), 0, 0, logprobs, top, num_top), neighbour],
    )
    frames = link.step_frames(result, draining=False)
    assert max(map(len, frames)) < 2**20
    steps = [read_step(frame, 1 << 20) for frame in frames]
    assert [step.seq for step in steps] == list(range(1, len(frames) + 1))
    assert [list(step.token_ids) for step in steps] == [[]] * (len(frames) - 1) + [[5]]
    receiver = TokenReceiver(1, num_prompt_logprobs=count)
    merged = link_pb2.ServerFrame.FromString(b"".join(frames)).step.prompt_logprobs
    for entry in merged[:-1]:
        receiver.on_prompt_logprobs(entry)
    assert (merged[-1].handle, merged[-1].offset, len(merged[-1].values.logprobs)) == (8, 3, 2)
    values = [values for _, values in receiver.take_prompt_logprobs()]
    assert sum(len(part.logprobs) for part in values) == count
    alternatives = [value for part in values for value in part.top_logprobs]
    assert alternatives == [-0.5 - place for place in range(num_top)] * count


def test_a_prediction_reaches_the_engine_and_usage_tells_what_became_of_it() -> None:
    config = engine_kit.make_config(max_model_len=128, num_blocks=64, max_num_seqs=16)
    speculator = Speculator(SuffixDrafter(), TakesAll())
    engine = Engine(config, engine_kit.FakePagedRunner(config), engine_kit.SimClock(), speculator=speculator)
    expected, _ = engine_kit.undisturbed(engine_kit.make_request(0, [5, 6], max_tokens=60, ignore_eos=True), 0, 128)
    link = EngineLink(0, engine)
    link.grant(1, 1000)
    link.load(draining=False)
    sampling = common_pb2.SamplingParams(max_tokens=60, ignore_eos=True, seed=0)
    submit = link_pb2.Submit(handle=1, token_ids=[5, 6], sampling=sampling, prediction_token_ids=[*expected[:50], 1, 2])
    assert link.on_frame(link_pb2.ClientFrame(submit=submit).SerializeToString(), 0.0, draining=False) is None
    came: list[int] = []
    steps: list[link_pb2.StepOutput] = []
    while engine.has_unfinished():
        frames = link.step_frames(engine.step().links[0], draining=False)
        steps += [link_pb2.ServerFrame.FromString(frame).step for frame in frames]
        came += steps[-1].token_ids
    assert came == expected
    assert [list(step.counts) for step in steps[:3]] == [[1], [16], [16]]
    (finish,) = steps[-1].finished
    stats = engine.stats()
    assert finish.usage.accepted_prediction_tokens == stats.accepted_tokens >= 45
    assert finish.usage.rejected_prediction_tokens == stats.draft_tokens - stats.accepted_tokens
