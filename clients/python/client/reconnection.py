"""Automatic resumption of a stream whose connection broke."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from scalellm.client.errors import ClientError
from scalellm.client.received import Received

_MOST_TRIES = 10
_FIRST_WAIT = 0.1
_LONGEST_WAIT = 3.0
"""Seconds. Ten tries take some twenty of them: a server is started again in less."""

OpenCall = Callable[[str, Sequence[int], float | None], Any]
"""Calls Resume, with the request's id, the tokens of each sample that were received, and seconds until the deadline."""


class Reconnection:
    """Goes on with an answer that is kept, as long as a try now and then brings more of it.

    Args:
        open_call: See OpenCall.
        timeout: Seconds from now on for all of the answer; None: any.
    """

    def __init__(self, open_call: OpenCall, timeout: float | None) -> None:
        self._open_call = open_call
        self._deadline = time.monotonic() + timeout if timeout is not None else None
        self._num_tries = 0
        self._num_tokens = 0

    def wait_after(self, error: ClientError, received: Received) -> float | None:
        """Return the seconds to wait before the next try; None where the error is the end of the stream."""
        started = received.started
        if error.code is not grpc.StatusCode.UNAVAILABLE or started is None or not started.resumable:
            return None
        if sum(received.offsets) > self._num_tokens:
            self._num_tokens, self._num_tries = sum(received.offsets), 0
        self._num_tries += 1
        wait: float = max(error.retry_after or 0.0, min(_FIRST_WAIT * 2 ** (self._num_tries - 1), _LONGEST_WAIT))
        left = self._seconds_left()
        if self._num_tries > _MOST_TRIES or (left is not None and wait >= left):
            return None
        return wait

    def open(self, received: Received) -> Any:
        """Return a call that streams the rest."""
        assert received.started is not None
        return self._open_call(received.started.request_id, received.offsets, self._seconds_left())

    def _seconds_left(self) -> float | None:
        return self._deadline - time.monotonic() if self._deadline is not None else None
