"""Ctrl-C while an answer is received."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from scalellm.cli.generation import Generation
from scalellm.client import ClientError
from scalellm.v1.generation_pb2 import Delta, GenerateRequest, GenerateResponse


class FakeStream:
    """An answer that interrupts the program after a word and breaks off once it is closed."""

    def __init__(self, *, can_be_closed: bool = True) -> None:
        self.interrupted_within = False
        """True if an exception of the signal was raised where the stream is waited for."""
        self._can_be_closed = can_be_closed
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[GenerateResponse]:
        yield GenerateResponse(delta=Delta(text="word "))
        try:
            os.kill(os.getpid(), signal.SIGINT)
            if not self._can_be_closed:
                os.kill(os.getpid(), signal.SIGINT)
            assert self._closed.wait(120)
        except KeyboardInterrupt:
            self.interrupted_within = True
            raise
        raise ClientError(grpc.StatusCode.CANCELLED, "the stream was closed")

    def close(self) -> None:
        if self._can_be_closed:
            self._closed.set()

    def __enter__(self) -> "FakeStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class FakeClient:
    """Client of one stream."""

    def __init__(self, stream: FakeStream) -> None:
        self._stream = stream

    def generate(self, request: GenerateRequest, timeout: float | None = None) -> FakeStream:
        return self._stream


@pytest.mark.parametrize("can_be_closed", [True, False])
def test_ctrl_c_closes_the_stream_and_the_second_one_ends_at_once(can_be_closed: bool) -> None:
    stream = FakeStream(can_be_closed=can_be_closed)
    client: Any = FakeClient(stream)
    generation = Generation()
    with pytest.raises(KeyboardInterrupt):
        generation.run(client, GenerateRequest(), lambda text: None)
    assert stream.interrupted_within is not can_be_closed
    assert generation.samples[0].text == "word "
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
