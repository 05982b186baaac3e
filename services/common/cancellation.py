"""Protection of tasks against libraries that lose a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cancellable() -> Iterator[None]:
    """Context for awaiting a library. Raises CancelledError at its end if the task was cancelled within it.

    The Redis client uses asyncio.wait_for, which in Python 3.11 loses a cancellation that comes together with the
    answer, and a gRPC call that is being set up treats it as its own. Without this check, a loop would never end.
    """
    try:
        yield
    finally:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
