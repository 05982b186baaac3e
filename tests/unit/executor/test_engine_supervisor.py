"""The progress of an engine, as the front sees it in reports."""

from __future__ import annotations

import pytest

from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine_supervisor import EngineSupervisor
from scalellm.services.executor.ipc import Kind, Message
from scalellm.v1 import executor_pb2, link_pb2

BUSY = {"steps": 7, "finished": 5, "cancelled": 4, "rejected": 3, "load": link_pb2.Load(waiting=2)}


class Beats:
    """A heartbeat that counts."""

    is_alive = True

    def __init__(self) -> None:
        self.count = 0

    def beat(self, has_work: bool) -> None:
        assert has_work
        self.count += 1


@pytest.fixture
def beats() -> Beats:
    return Beats()


@pytest.fixture
def supervisor(beats: Beats) -> EngineSupervisor:
    supervisor = EngineSupervisor(ExecutorSettings())
    supervisor._heartbeat = beats  # type: ignore[assignment]
    supervisor._on_ready = lambda: None
    return supervisor


def report(supervisor: EngineSupervisor, **changes: object) -> None:
    payload = executor_pb2.GetExecutorInfoResponse(**(BUSY | changes)).SerializeToString()
    supervisor._on_message(Message(Kind.STATS, payload=payload))


@pytest.mark.parametrize("what", ["steps", "finished", "cancelled", "rejected"])
def test_an_engine_whose_steps_or_ended_requests_grow_in_number_gets_on(
    supervisor: EngineSupervisor, beats: Beats, what: str
) -> None:
    """One that is sent only invalid grammars has work all the time, and takes no step."""
    report(supervisor)
    before = beats.count
    report(supervisor)
    assert beats.count == before
    for number in range(1, 4):
        report(supervisor, **{what: BUSY[what] + number})
        assert beats.count == before + number


def test_an_engine_without_work_need_only_report(supervisor: EngineSupervisor, beats: Beats) -> None:
    for number in range(1, 4):
        report(supervisor, load=link_pb2.Load())
        assert beats.count == number
