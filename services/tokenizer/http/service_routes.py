"""Routes about the service itself: /health, /ping, /version, /v1/models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import grpc
from aiohttp import hdrs, web

from scalellm import __version__
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.face import HttpFace


class ServiceRoutes:
    """Answers for one worker.

    Args:
        edge: The worker.
        is_ready: Tells if the service can do its work now.
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
        """200 while requests are served, 503 while not."""
        is_ready = self._is_ready()
        return json_answer({"status": "ok" if is_ready else "unavailable"}, status=200 if is_ready else 503)

    async def version(self, call: HttpCall) -> web.StreamResponse:
        """Answer with the version of ScaleLLM."""
        return json_answer({"version": __version__})

    async def models(self, call: HttpCall) -> web.StreamResponse:
        """The one model."""
        return json_answer({"object": "list", "data": [self._model()]})

    async def model(self, call: HttpCall) -> web.StreamResponse:
        """The model, if it is the one that is asked for."""
        check_model(call.request.match_info["model"], self._edge)
        return json_answer(self._model())

    def _model(self) -> dict[str, object]:
        welcome, name = self._edge.schedulers.welcome, self._edge.model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "scalellm",
            "root": name,
            "parent": None,
            "max_model_len": welcome.max_model_len if welcome is not None else None,
        }


def check_model(name: str | None, edge: Edge) -> None:
    """Raise StatusError NOT_FOUND unless `name` is the model that is served, or None."""
    if name is not None and name != edge.model_name:
        raise StatusError(
            grpc.StatusCode.NOT_FOUND,
            f"model: {name[:256]!r} is not served here, only {edge.model_name!r} is",
            field="model",
        )


def json_answer(value: object, status: int = 200) -> web.Response:
    """Return an answer that is a JSON document."""
    return web.Response(status=status, body=json.dumps(value).encode(), content_type="application/json")
