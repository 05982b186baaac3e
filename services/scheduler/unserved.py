"""Requests that tokenizer workers refused because no scheduler took their link."""

from __future__ import annotations

from scalellm.v1 import link_pb2

_MOST_CLIENTS = 4096
"""Most workers that are remembered. Beyond that all are forgotten, and their next counts are taken as new once more."""


class Unserved:
    """Detects newly refused requests of workers, whose Hellos carry the number of them since the worker's start."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}  # by client id

    def has_more(self, hello: link_pb2.Hello) -> bool:
        """True if a worker refused requests since its last Hello."""
        if hello.unserved <= self._told.get(hello.client_id, 0):
            return False
        if len(self._told) >= _MOST_CLIENTS:
            self._told.clear()
        self._told[hello.client_id] = hello.unserved
        return True
