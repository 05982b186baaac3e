"""The numbers that stand for requests on one link, as its upstream end gives them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

RequestT = TypeVar("RequestT")

_MAX_HANDLE = 2**32 - 1


class Handles(Generic[RequestT]):
    """The requests of one connection by their handles.

    A handle is taken from its Submit to its Finish, also when the request is released before: what still comes for it
    must not meet another request.

    Attributes:
        requests: Those that still want what comes for them, by their handles.
        get: Returns the request that still wants what comes for a handle; None where there is none.
    """

    def __init__(self) -> None:
        self._requests: dict[int, RequestT] = {}
        self.requests: Mapping[int, RequestT] = self._requests
        # The dictionary's own method: a call of ours, once per token, would cost more than the look-up.
        self.get: Callable[[int], RequestT | None] = self._requests.get
        self._released: set[int] = set()
        self._last = 0

    def __len__(self) -> int:
        """Handles whose Finish has not come."""
        return len(self._requests) + len(self._released)

    def take(self, request: RequestT) -> int:
        """A free handle for a request."""
        while True:
            self._last = self._last % _MAX_HANDLE + 1
            if self._last not in self._requests and self._last not in self._released:
                self._requests[self._last] = request
                return self._last

    def release(self, handle: int) -> None:
        """The request wants nothing more; its Finish is still to come."""
        del self._requests[handle]
        self._released.add(handle)

    def finish(self, handle: int) -> RequestT | None:
        """A Finish came: the handle is free. Returns the request if that was not released."""
        self._released.discard(handle)
        return self._requests.pop(handle, None)

    def clear(self) -> list[RequestT]:
        """The connection is gone, and all handles with it. Returns the requests that were not released."""
        requests = list(self._requests.values())
        self._requests.clear()
        self._released.clear()
        self._last = 0
        return requests
