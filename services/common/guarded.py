"""Around every handler of a call: what it raises becomes the call's status, and nothing of it stays."""

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
"""Told of each call that ended: the method's full name, and the status."""


def guarded(
    behaviour: Callable[[RequestT, grpc.aio.ServicerContext], Awaitable[ResponseT]],
    method: str,
    on_end: OnEnd | None = None,
) -> Callable[[RequestT, grpc.aio.ServicerContext], Awaitable[ResponseT | None]]:
    """Make a handler for gRPC of one that raises StatusError for every outcome but OK.

    Any other error is a mistake of ours: its traceback is logged and the caller gets INTERNAL. Nothing of an error
    outlives its call: where a frame has a variable for an error that passed through it, they are a cycle, which would
    keep the request in memory until the garbage collector comes by.
    """
    limit = LineLimit()

    async def call(request: RequestT, context: grpc.aio.ServicerContext) -> ResponseT | None:
        code = grpc.StatusCode.CANCELLED  # which is all that ends a call without passing one of the lines below
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
    """Return the status with which a call ends that raised; of an error that is no status, a mistake of ours, the log
    has the traceback. To be called where the error is handled.

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
    """Forget where an error, and those that led to it, came from: the frames hold what the call held."""
    link: BaseException | None = error
    while link is not None:
        earlier = link.__cause__ or link.__context__
        link.__traceback__ = link.__cause__ = link.__context__ = None
        link = earlier
