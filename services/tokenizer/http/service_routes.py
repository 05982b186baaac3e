"""Routes about the service itself: /health, /ping, /version, /v1/models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from functools import partial

from aiohttp import hdrs, web

from scalellm import __version__
from scalellm.services.tokenizer.aliases import identity_of
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.json_object import JsonObject
from scalellm.v1 import generation_pb2


class ServiceRoutes:
    """Answers for one worker.

    Args:
        edge: The worker.
        is_ready: Returns whether the service can serve now.
    """

    def __init__(self, edge: Edge, is_ready: Callable[[], bool]) -> None:
        self._edge = edge
        self._is_ready = is_ready
        self._created = int(time.time())

    def register(self, face: HttpFace, app: web.Application) -> None:
        """Add the routes."""
        face.add(app, hdrs.METH_GET, "/health", self.health)
        face.add(app, hdrs.METH_GET, "/ping", self.health)
        face.add(app, hdrs.METH_GET, "/version", self.version)
        face.add(app, hdrs.METH_GET, "/v1/models", self.models)
        face.add(app, hdrs.METH_GET, "/v1/models/{model:.+}", self.model)

    async def health(self, call: HttpCall) -> web.StreamResponse:
        """Return 200 while requests are served, else 503."""
        is_ready = self._is_ready()
        return json_answer({"status": "ok" if is_ready else "unavailable"}, status=200 if is_ready else 503)

    async def version(self, call: HttpCall) -> web.StreamResponse:
        """Answer with the version of ScaleLLM."""
        return json_answer({"version": __version__})

    async def models(self, call: HttpCall) -> web.StreamResponse:
        """List all models, the default first, and then the aliases."""
        models = self._edge.models
        return json_answer({"object": "list", "data": list(map(self._model, (*models.names, *models.aliases)))})

    async def model(self, call: HttpCall) -> web.StreamResponse:
        """Describe the model or alias in the path. `root` is the model, for an alias the one with the largest
        weight.
        """
        return json_answer(self._model(call.request.match_info["model"]))

    def _model(self, name: str) -> dict[str, object]:
        edge = self._edge.models.choose(name)
        welcome = edge.schedulers.welcome
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "scalellm",
            "root": edge.model_name,
            "parent": None,
            "max_model_len": welcome.max_model_len if welcome is not None else None,
        }


async def choose_edge(
    edge: Edge,
    call: HttpCall,
    body: JsonObject,
    model: str | None,
    *,
    session_id: str = "",
    kept_id: str = "",
    earlier: str = "",
) -> Edge:
    """Return the edge of the model that a request names, or began with. Raises StatusError; see `Edges.of_request`.

    Args:
        edge: The worker.
        call: The request.
        body: Its body.
        model: Name that the request gives; None: none.
        session_id: The session that it continues; empty: none.
        kept_id: The id under which it is kept; empty: it is not.
        earlier: Model of the answer that it goes on from by text alone; empty: none.
    """
    tenant, identity = edge.access.tenant(), partial(_identity, call, body)
    return await edge.models.of_request(
        model, tenant, identity, session_id=session_id, kept_id=kept_id, earlier=earlier
    )


def _identity(call: HttpCall, body: JsonObject) -> bytes:
    given, seed = body.get("request_id"), body.get("seed")
    return identity_of(
        given if isinstance(given, str) and given else call.given_id,
        seed if isinstance(seed, int) else None,
        lambda: body.get("prompt", body.get("messages")),
    )


def name_model(edge: Edge, requests: Iterable[generation_pb2.GenerateRequest], model: str | None) -> None:
    """Set the model name in requests if there are several models, so that requests for other models have other
    digests.
    """
    if model is not None and edge.models.are_several:
        for request in requests:
            request.model = model


def json_answer(value: object, status: int = 200) -> web.Response:
    """Return an answer that is a JSON document."""
    return web.Response(status=status, body=json.dumps(value).encode(), content_type="application/json")
