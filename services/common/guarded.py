"""The wrapper of all handlers of calls, which turns exceptions into the call's status and drops their tracebacks."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.logs import LineLimit

_log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

OnEnd = Callable[[str, grpc.StatusCode], None]
"""Called with each call that ended: the method's full name, and the status."""


def guarded(
    behaviour: Callable[[RequestT, grpc.aio.ServicerContext], Awaitable[ResponseT]],
    method: str,
    on_end: OnEnd | None = None,
) -> Callable[[RequestT, grpc.aio.ServicerContext], Awaitable[ResponseT | None]]:
    """Make a gRPC handler of a handler that raises StatusError for every outcome but OK.

    Any other exception is a bug: its traceback is logged and the caller gets INTERNAL. Tracebacks are dropped, because
    an exception and a frame with a variable for it form a reference cycle, which would keep the request in memory until
    the next garbage collection.
    """
    limit = LineLimit()

    async def call(request: RequestT, context: grpc.aio.ServicerContext) -> ResponseT | None:
        code = grpc.StatusCode.CANCELLED  # a cancellation passes none of the lines below
        try:
            response = await behaviour(request, context)
            code = grpc.StatusCode.OK
            return response
        except grpc.aio.BaseError:
            raise
        except Exception as error:
            failure = status_of(error, method, limit)
            code = failure.code
        finally:
            if on_end is not None:
                on_end(method, code)
        await failure.end(context)
        return None

    return call


def status_of(error: Exception, method: str, limit: LineLimit) -> StatusError:
    """Return the status of a call that raised an exception. Any exception but StatusError is a bug, whose traceback is
    logged. Must be called while the exception is being handled.

    Args:
        error: The exception. Its traceback is dropped.
        method: Name of the method.
        limit: Limit of lines in the log.
    """
    failure = error if isinstance(error, StatusError) else None
    if failure is None:
        failure = StatusError(grpc.StatusCode.INTERNAL, "internal error; the server's log says more")
        if limit.admit() is not None:
            _log.exception("%s failed; its client is told INTERNAL", method)
    drop_tracebacks(error)
    return failure


def drop_tracebacks(error: BaseException) -> None:
    """Drop the tracebacks of an exception and of its causes, because their frames keep the call's objects in memory."""
    link: BaseException | None = error
    while link is not None:
        earlier = link.__cause__ or link.__context__
        link.__traceback__ = link.__cause__ = link.__context__ = None
        link = earlier
