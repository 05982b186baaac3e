"""Handles, the numbers of requests on one link, which its upstream end assigns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

RequestT = TypeVar("RequestT")

_MAX_HANDLE = 2**32 - 1


class Handles(Generic[RequestT]):
    """The requests of one connection by their handles.

    A handle is in use from its Submit to its Finish, even if the request is released before, so that later results for
    it cannot reach another request.

    Attributes:
        requests: The requests that were not released, by handle.
        get: Returns the request of a handle; None if there is none, or it was released.
    """

    def __init__(self) -> None:
        self._requests: dict[int, RequestT] = {}
        self.requests: Mapping[int, RequestT] = self._requests
        # The dictionary's own method, because a Python call per token would cost more than the look-up.
        self.get: Callable[[int], RequestT | None] = self._requests.get
        self._released: set[int] = set()
        self._last = 0

    def __len__(self) -> int:
        """Return the number of handles whose Finish has not arrived."""
        return len(self._requests) + len(self._released)

    def take(self, request: RequestT) -> int:
        """Assign a free handle to a request."""
        while True:
            self._last = self._last % _MAX_HANDLE + 1
            if self._last not in self._requests and self._last not in self._released:
                self._requests[self._last] = request
                return self._last

    def release(self, handle: int) -> None:
        """Release a request that wants no more results, although its Finish has not arrived."""
        del self._requests[handle]
        self._released.add(handle)

    def finish(self, handle: int) -> RequestT | None:
        """Free a handle whose Finish has arrived. Returns its request if that was not released."""
        self._released.discard(handle)
        return self._requests.pop(handle, None)

    def clear(self) -> list[RequestT]:
        """Free all handles, after the connection was lost. Returns the requests that were not released."""
        requests = list(self._requests.values())
        self._requests.clear()
        self._released.clear()
        self._last = 0
        return requests
