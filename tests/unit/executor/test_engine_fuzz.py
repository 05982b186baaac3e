"""Any bytes in any order may come through a scheduler's link to the engine process, and the engine lives on."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine_kit
from mutated_messages import FRAMES, mutations
from scalellm.services.executor.build import LoadedEngine
from scalellm.services.executor.engine import Engine
from scalellm.services.executor.engine_process import EngineLoop
from scalellm.services.executor.ipc import EngineChannel, Kind, Message
from scalellm.v1 import executor_pb2, link_pb2

ANSWERS = {Kind.WELCOME, Kind.REFUSE, Kind.FRAME, Kind.STATS}
HELLO = FRAMES[0].SerializeToString()

from_front = st.one_of(
    st.builds(Message, st.sampled_from((Kind.OPEN, Kind.FRAME)), st.integers(1, 3), mutations(FRAMES)),
    st.builds(Message, st.just(Kind.OPEN), st.integers(1, 3), st.just(HELLO)),
    st.builds(Message, st.sampled_from((Kind.CLOSE, Kind.DRAIN)), st.integers(1, 3)),
)


@settings(max_examples=100)
@given(st.lists(from_front, max_size=8))
def test_no_frame_ends_the_engine(sent: list[Message]) -> None:
    config = engine_kit.make_config(max_model_len=64, num_blocks=32, max_num_batched_tokens=16)
    clock = engine_kit.SimClock()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine = Engine(config, engine_kit.FakePagedRunner(config, on_execute=lambda batch: clock.advance(0.1)), clock)
        loaded = LoadedEngine(engine, link_pb2.Welcome(), executor_pb2.GetExecutorInfoResponse())
        ours.sendall(b"".join(message.encode() for message in sent))
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            EngineLoop(loaded, EngineChannel(theirs), clock).run()
        assert {message.kind for message in EngineChannel(ours).receive(0.0)} <= ANSWERS
