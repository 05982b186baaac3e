"""The models of one worker, and the choice of the one for a request."""

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
        """Add the edge of a model."""
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
        """Return the edge of a model for a call that does not generate; None: the default.

        An alias stands for its model with the largest weight. Raises StatusError NOT_FOUND for an unknown name.
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
        """Return the edge of a request: the model that it names, or else, for a session or a kept request, the model
        that it began with.

        For an alias, the model of a new session or request is chosen by its id, or else by the request's identity.

        Args:
            name: Model or alias that the request names; None: none.
            tenant: The tenant of the request.
            identity: Returns the request's identity; see `identity_of`.
            session_id: The session that it continues; empty: none.
            kept_id: The id under which it is kept; empty: it is not.
            earlier: Model of the answer that it continues by text alone; empty: none.

        Raises:
            StatusError: NOT_FOUND for an unknown name; UNAVAILABLE if Redis does not answer; FAILED_PRECONDITION if the
                model that it began with is no longer served.
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
        """Raise StatusError FAILED_PRECONDITION if a session would go on with another model than it began with."""
        if self.are_several and began_with not in ("", edge.model_name):
            message = f"model: session {session_id!r} began with {began_with!r} and goes on with that alone"
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, message, field="model")

    def serving(self, name: str) -> Edge:
        """Return the edge for a session or request that began with a model. Raises StatusError FAILED_PRECONDITION if
        that model is no longer served.

        If a single model is served, it is taken whatever its name, since it may have been renamed.
        """
        edge = self._by_name.get(name) if self.are_several else self.default
        if edge is None:
            message = f"model: {name!r}, with which this began, is served no more"
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, message, field="model")
        return edge
