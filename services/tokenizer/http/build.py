"""Puts the HTTP face of a worker together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from scalellm.services.common.guarded import OnEnd
from scalellm.services.tokenizer.call_bytes import CallBytes
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.anthropic_routes import AnthropicRoutes
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.http.fleet_routes import FleetRoutes, make_fleet_watch
from scalellm.services.tokenizer.http.listener import HttpListener
from scalellm.services.tokenizer.http.metrics_route import MetricsRoute
from scalellm.services.tokenizer.http.openai_routes import OpenAiRoutes
from scalellm.services.tokenizer.http.page_routes import PageRoutes
from scalellm.services.tokenizer.http.responses_routes import ResponsesRoutes
from scalellm.services.tokenizer.http.service_routes import ServiceRoutes
from scalellm.services.tokenizer.http.sessions_routes import SessionsRoutes
from scalellm.services.tokenizer.http.tokenize_routes import TokenizeRoutes
from scalellm.services.tokenizer.rpc import CallGate

_log = logging.getLogger(__name__)


def make_listener(
    edge: Edge,
    settings: TokenizerSettings,
    port: int,
    gate: CallGate,
    held: CallBytes,
    on_end: OnEnd,
    is_ready: Callable[[], bool],
) -> HttpListener:
    """Return the listener, not started yet. Raises ConfigFileError.

    Args:
        edge: The worker.
        settings: The service's.
        port: The port that is reserved for the workers.
        gate: Closed while the worker drains.
        held: Limits the bytes that calls hold in the worker.
        on_end: Called with each call that ended.
        is_ready: Returns whether the worker can serve now.
    """
    if not all(each.prompts.can_take_content_as_text for each in edge.models):
        _log.warning(
            "texts of special tokens in chats that come by HTTP are special tokens: the tokenizer knows no other"
        )
    face = HttpFace(edge, gate, held, on_end, settings.cors_origins)
    app = make_application(face, settings, is_ready)
    return HttpListener(app, settings.host, port, settings.tls_files, settings.max_connections)


def make_application(face: HttpFace, settings: TokenizerSettings, is_ready: Callable[[], bool]) -> web.Application:
    """Return everything that is served. Arguments as for `make_listener`."""
    app = face.application()
    ServiceRoutes(face.edge, is_ready).register(face, app)
    OpenAiRoutes(face.edge, is_strict=settings.http_strict).register(face, app)
    ResponsesRoutes(face.edge, is_strict=settings.http_strict).register(face, app)
    AnthropicRoutes(face.edge, is_strict=settings.http_strict).register(face, app)
    TokenizeRoutes(face.edge, is_strict=settings.http_strict).register(face, app)
    SessionsRoutes(face.edge, settings.session_ttl_s, is_strict=settings.http_strict).register(face, app)
    if settings.playground:
        PageRoutes().register(face, app)
        FleetRoutes(make_fleet_watch(face.edge, settings), face.gate).register(face, app)
    if settings.http_metrics:
        # The folder in which prometheus_client keeps the workers' files, set by the supervisor.
        MetricsRoute(settings, Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])).register(face, app)
    return app
