"""Results of short steps are sent together: nothing is lost, reordered, or held longer than it may be."""

from __future__ import annotations

import socket
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine_kit
from scalellm.services.common.link import API_MINOR
from scalellm.services.executor.build import LoadedEngine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine import Engine, LinkResult, StepResult
from scalellm.services.executor.engine.request import ResumedSample
from scalellm.services.executor.engine_process import EngineLoop
from scalellm.services.executor.ipc import EngineChannel, Kind, Message
from scalellm.services.executor.limits import output_interval
from scalellm.services.executor.paced_output import PacedOutput
from scalellm.v1 import common_pb2, executor_pb2, link_pb2

HELLO = link_pb2.ClientFrame(hello=link_pb2.Hello(api_minor=API_MINOR)).SerializeToString()


def tokens(offset: int, *handles: int) -> LinkResult:
    """The results of a step: token `100 * handle + offset` of each request."""
    count = len(handles)
    columns = list(handles), [0] * count, [offset] * count, [1] * count
    return LinkResult(*columns, [100 * handle + offset for handle in handles])


def step_of(*, is_first: bool = False, **links: LinkResult) -> StepResult:
    """A step's results for the links `l1` and `l2`."""
    return StepResult(
        defaultdict(LinkResult, {int(link[1:]): part for link, part in links.items()}), has_first=is_first
    )


def submit(handle: int, max_tokens: int, prompt: tuple[int, ...] = (1, 2, 3)) -> Message:
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=handle)
    frame = link_pb2.ClientFrame(submit=link_pb2.Submit(handle=handle, token_ids=prompt, sampling=sampling))
    return Message(Kind.FRAME, 1, frame.SerializeToString())


class Served:
    """Frames that a loop sent, as (time, frame), and the tokens that they had, by request."""

    def __init__(self, arrivals: dict[int, Message], seconds: list[float], interval: float) -> None:
        """Run a loop whose steps take the given times in turn; `arrivals` come while the step of that number runs."""
        config = engine_kit.make_config(max_num_batched_tokens=16)
        clock = engine_kit.SimClock()
        ours, theirs = socket.socketpair()
        self.frames: list[tuple[float, link_pb2.StepOutput]] = []
        self.steps: list[tuple[float, int]] = []
        """Time at which each step ended, and its number of prompt tokens."""
        with ours, theirs:
            received = EngineChannel(ours)

            def on_execute(batch: object) -> None:
                self._note(received, clock())
                clock.advance(seconds[len(self.steps) % len(seconds)])
                self.steps.append((clock(), runner.batches[-1][1]))
                if (message := arrivals.pop(len(self.steps), None)) is not None:
                    ours.sendall(message.encode())

            runner = engine_kit.FakePagedRunner(config, on_execute=on_execute)
            engine = Engine(config, runner, clock)
            loaded = LoadedEngine(
                engine, link_pb2.Welcome(), executor_pb2.GetExecutorInfoResponse(), output_interval=interval
            )
            loop = EngineLoop(loaded, EngineChannel(theirs), clock)
            ours.sendall(Message(Kind.OPEN, 1, HELLO).encode() + arrivals.pop(0).encode())
            loop.turn()
            while engine.has_unfinished():
                loop.turn()
                self._note(received, clock())
        self.tokens: dict[int, list[int]] = {}
        for _, step in self.frames:
            start = 0
            for handle, offset, count in zip(step.handles, step.offsets, step.counts, strict=True):
                come = self.tokens.setdefault(handle, [])
                assert len(come) == offset
                come += step.token_ids[start : start + count]
                start += count
        self.finished = [finish.handle for _, step in self.frames for finish in step.finished]

    def _note(self, received: EngineChannel, now: float) -> None:
        for message in received.receive(0.0):
            if message.kind is Kind.FRAME:
                self.frames.append((now, link_pb2.ServerFrame.FromString(message.payload).step))

    @property
    def with_tokens(self) -> list[tuple[float, link_pb2.StepOutput]]:
        return [(time, step) for time, step in self.frames if step.handles]


def test_tokens_of_short_steps_come_together_but_for_the_first_and_the_last() -> None:
    held = Served({0: submit(1, 12)}, [0.004], 0.010)
    assert [list(step.counts) for _, step in held.with_tokens] == [[1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1]]
    at_once = Served({0: submit(1, 12)}, [0.004], 0.0)
    assert [list(step.counts) for _, step in at_once.with_tokens] == [[1]] * 12
    assert held.tokens == at_once.tokens
    assert held.finished == at_once.finished == [1]


def test_no_frames_have_only_a_load_while_tokens_are_held() -> None:
    """Frames are what holding back saves. A load is due every tenth of a second."""
    served = Served({0: submit(1, 55)}, [0.004], 0.010)
    assert served.steps[-1][0] > 0.2
    assert len(served.frames) == len(served.with_tokens) + 1  # credits, before the first step


def test_held_results_are_sent_before_a_step_that_computes_a_prompt() -> None:
    """Such a step may take long."""
    served = Served({0: submit(1, 20), 3: submit(2, 5)}, [0.001, 0.001, 0.001, 5.0, 0.001], 1.0)
    ends = [time for time, _ in served.steps]
    assert served.steps[3][1] == 3
    before = [step for time, step in served.with_tokens if time < ends[3]]
    assert sum(len(step.token_ids) for step in before) == 3  # those of the three steps before it


@given(
    arrivals=st.dictionaries(st.integers(1, 12), st.integers(1, 20), max_size=4),
    seconds=st.lists(st.sampled_from([0.001, 0.004, 0.02, 0.3]), min_size=1, max_size=9),
    interval=st.sampled_from([0.003, 0.01, 0.1]),
)
def test_tokens_are_the_same_and_none_waits_longer_than_the_interval_and_a_step(
    arrivals: dict[int, int], seconds: list[float], interval: float
) -> None:
    messages = {step: submit(2 + step, length) for step, length in arrivals.items()}
    first = submit(1, 13)
    held = Served({0: first} | messages, seconds, interval)
    at_once = Served({0: first} | messages, seconds, 0.0)
    assert held.tokens == at_once.tokens
    assert held.finished == at_once.finished
    assert sorted(held.finished) == sorted(held.tokens)
    # When each token was known, and when it came.
    known = {place: time for time, step in at_once.with_tokens for place in _places(step)}
    came = {place: time for time, step in held.with_tokens for place in _places(step)}
    ends = [0.0] + [time for time, _ in held.steps]
    longest = max(end - start for start, end in pairwise(ends))
    assert came.keys() == known.keys()
    for place, time in came.items():
        assert 0 <= time - known[place] <= interval + longest
        if place[1] == 0:
            assert time == known[place]


def _places(step: link_pb2.StepOutput) -> list[tuple[int, int]]:
    return [(handle, offset) for handle, offset in zip(step.handles, step.offsets, strict=True)]


def test_results_are_held_by_link_and_come_together() -> None:
    output = PacedOutput(0.010)
    assert output.add(step_of(l1=tokens(3, 7)), 0.0) == {1: tokens(3, 7)}
    assert output.add(step_of(l1=tokens(4, 7)), 0.004) == {}
    assert output.add(step_of(l2=tokens(9, 5)), 0.008) == {}
    both = output.add(step_of(l1=tokens(5, 7, 8)), 0.012)
    joined = LinkResult([7, 7, 8], [0, 0, 0], [4, 5, 5], [1, 1, 1], [704, 705, 805])
    assert both == {1: joined, 2: tokens(9, 5)}
    assert output.take(0.013) == {}


def test_first_tokens_are_sent_with_all_that_is_held() -> None:
    output = PacedOutput(0.010)
    output.add(step_of(l1=tokens(3, 7)), 0.0)
    output.add(step_of(l2=tokens(4, 5)), 0.001)
    assert output.add(step_of(l1=tokens(0, 9), is_first=True), 0.002).keys() == {1, 2}


def test_results_after_those_that_were_taken_before_a_long_step_are_not_held() -> None:
    """On a GPU they are those of the short step before it, and come while the long one runs."""
    output = PacedOutput(0.010)
    output.add(step_of(l1=tokens(3, 7)), 0.0)
    output.add(step_of(l1=tokens(4, 7)), 0.001)
    assert output.take() == {1: tokens(4, 7)}
    assert output.add(step_of(l1=tokens(5, 7)), 0.002) == {1: tokens(5, 7)}


@pytest.mark.parametrize("resumed", [0, 3])
def test_the_first_token_of_a_request_is_known_also_if_it_was_resumed(resumed: int) -> None:
    config = engine_kit.make_config()
    engine = Engine(config, engine_kit.FakePagedRunner(config), engine_kit.SimClock())
    tokens_before = [7, 8, 9][:resumed]
    request = engine_kit.make_request(
        1, [4, 5], max_tokens=8, ignore_eos=True, resumed=(ResumedSample(0, tuple(tokens_before), None),)
    )
    engine.add(request)
    results = [engine.step() for _ in range(3)]
    assert [result.links[0].offsets for result in results] == [[resumed], [resumed + 1], [resumed + 2]]
    assert [result.has_first for result in results] == [True, False, False]


def test_a_step_without_results_sends_what_has_become_due() -> None:
    """As the steps of an engine whose requests wait for the mask of a grammar."""
    output = PacedOutput(0.010)
    output.add(step_of(l1=tokens(3, 7)), 0.0)
    output.add(step_of(l1=tokens(4, 7)), 0.004)
    assert output.add(step_of(), 0.009) == {}
    assert output.add(step_of(), 0.011) == {1: tokens(4, 7)}


def test_a_cpu_holds_tokens_back_by_default_and_a_gpu_does_not() -> None:
    assert output_interval(ExecutorSettings(), on_gpu=False) == pytest.approx(0.010)
    assert output_interval(ExecutorSettings(), on_gpu=True) == 0.0
    assert output_interval(ExecutorSettings(output_interval_ms=2.5), on_gpu=True) == pytest.approx(0.0025)
    assert output_interval(ExecutorSettings(output_interval_ms=0), on_gpu=False) == 0.0
