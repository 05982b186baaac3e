"""For tasks that await libraries which lose a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cancellable() -> Iterator[None]:
    """Around awaits of a library: ends with CancelledError if the task was cancelled meanwhile, whatever came of them.

    The Redis client uses asyncio.wait_for, which in Python 3.11 loses a cancellation that comes with the answer, and a
    gRPC call that is being prepared takes it for its own. A loop that does not look would never end.
    """
    try:
        yield
    finally:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
