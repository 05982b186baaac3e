"""The models of one worker: which of them a request goes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.validation import is_id

if TYPE_CHECKING:
    from scalellm.services.tokenizer.generation.edge import Edge

_LONGEST_SHOWN = 256


class Edges:
    """The edge of each model, in the order in which they were listed: the first one is the default."""

    def __init__(self) -> None:
        self._by_name: dict[str, Edge] = {}

    def add(self, edge: Edge) -> None:
        """A model is served."""
        self._by_name[edge.model_name] = edge

    def __iter__(self) -> Iterator[Edge]:
        """The edges, the default first."""
        return iter(self._by_name.values())

    @property
    def default(self) -> Edge:
        """The edge of requests that name no model."""
        return next(iter(self))

    @property
    def names(self) -> Sequence[str]:
        """Names of the models, the default first."""
        return list(self._by_name)

    @property
    def are_several(self) -> bool:
        """True if requests may go to different models."""
        return len(self._by_name) > 1

    def choose(self, name: str | None) -> Edge:
        """Return the edge that a request for a model goes to; None: the default.

        Raises StatusError NOT_FOUND for a name that is not served.
        """
        if name is None:
            return self.default
        edge = self._by_name.get(name)
        if edge is None:
            served = " and ".join(map(repr, self.names))
            message = f"model: {name[:_LONGEST_SHOWN]!r} is not served here, only {served}"
            raise StatusError(
                grpc.StatusCode.NOT_FOUND, f"{message} {'are' if len(self.names) > 1 else 'is'}", field="model"
            )
        return edge

    async def of_request(self, name: str | None, tenant: Tenant, *, session_id: str = "", kept_id: str = "") -> Edge:
        """Return the edge of a request: a session, and a request that is kept, stay with the model they began with.

        Args:
            name: Name that the request gives; None: none.
            tenant: The tenant of the request.
            session_id: The session that it continues; empty: none.
            kept_id: The id under which it is kept; empty: it is not.

        Raises StatusError NOT_FOUND, UNAVAILABLE, and FAILED_PRECONDITION where it cannot go on with its model.
        """
        edge = self.choose(name)
        if not self.are_several or name in self._by_name:
            return edge
        began_with = ""
        if is_id(session_id):
            began_with = await edge.sessions.of(tenant).model_of(session_id)
        elif is_id(kept_id):
            began_with = await edge.kept.model_of(tenant, kept_id)
        return self.serving(began_with) if began_with else edge

    def check_session(self, session_id: str, began_with: str, edge: Edge) -> None:
        """Raise FAILED_PRECONDITION where a session would go on with a model to which its token ids mean nothing."""
        if self.are_several and began_with not in ("", edge.model_name):
            message = f"model: session {session_id!r} began with {began_with!r} and goes on with that alone"
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, message, field="model")

    def serving(self, name: str) -> Edge:
        """Return the edge of what began with a model. Raises StatusError FAILED_PRECONDITION if that is served no more.

        Where a single model is served, it may have been renamed since.
        """
        edge = self._by_name.get(name) if self.are_several else self.default
        if edge is None:
            message = f"model: {name!r}, with which this began, is served no more"
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, message, field="model")
        return edge
