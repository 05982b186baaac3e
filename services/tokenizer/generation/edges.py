"""The models of one worker: which of them a request goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.aliases import Aliases
from scalellm.services.tokenizer.validation import is_id

if TYPE_CHECKING:
    from scalellm.services.tokenizer.generation.edge import Edge

_LONGEST_SHOWN = 256


class Edges:
    """The edge of each model, in the order in which they were listed: the first one is the default.

    Args:
        aliases: Names that stand for models.
    """

    def __init__(self, aliases: Aliases | None = None) -> None:
        self._by_name: dict[str, Edge] = {}
        self._aliases = aliases or Aliases()

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
    def aliases(self) -> Sequence[str]:
        """Names that stand for models."""
        return list(self._aliases.by_name)

    @property
    def are_several(self) -> bool:
        """True if requests may go to different models."""
        return len(self._by_name) > 1

    def choose(self, name: str | None) -> Edge:
        """Return the edge of a model, where nothing is generated; None: the default.

        An alias stands for its model with the largest weight here. Raises StatusError NOT_FOUND for a name that is not
        served.
        """
        if name is None:
            return self.default
        alias = self._aliases.by_name.get(name)
        edge = self._by_name.get(alias.main if alias is not None else name)
        if edge is None:
            served = [*self.names, *self.aliases]
            message = f"model: {name[:_LONGEST_SHOWN]!r} is not served here, only {' and '.join(map(repr, served))}"
            raise StatusError(
                grpc.StatusCode.NOT_FOUND, f"{message} {'are' if len(served) > 1 else 'is'}", field="model"
            )
        return edge

    async def of_request(
        self,
        name: str | None,
        tenant: Tenant,
        identity: Callable[[], bytes],
        *,
        session_id: str = "",
        kept_id: str = "",
        earlier: str = "",
    ) -> Edge:
        """Return the edge of a request: a session, and a request that is kept, stay with the model they began with.

        Of the models of an alias, the choice follows from the session, or else from the request's identity.

        Args:
            name: Name that the request gives; None: none.
            tenant: The tenant of the request.
            identity: Returns what is the same when the request is sent again, and distinguishes it from others.
            session_id: The session that it continues; empty: none.
            kept_id: The id under which it is kept; empty: it is not.
            earlier: Model of the answer that it goes on from by text alone; empty: none.

        Raises StatusError NOT_FOUND, UNAVAILABLE, and FAILED_PRECONDITION where it cannot go on with its model.
        """
        edge = self.choose(name)
        if not self.are_several or name in self._by_name:
            return edge
        began_with = earlier if earlier in self._by_name else ""
        if is_id(session_id):
            began_with = await edge.sessions.of(tenant).model_of(session_id)
        elif is_id(kept_id):
            began_with = await edge.kept.model_of(tenant, kept_id)
        if began_with:
            return self.serving(began_with)
        alias = self._aliases.by_name.get(name) if name is not None else None
        if alias is None:
            return edge
        known = (session_id or kept_id).encode(errors="replace")
        return self._by_name[alias.choose(tenant.name, known or identity())]

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
