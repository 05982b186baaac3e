"""/metrics on the HTTP port: the same as the service's metrics endpoint, without the metrics of its processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from scalellm.services.common.metrics import make_registry
from scalellm.services.common.vllm_metrics import WithVllmNames
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.metrics import WorkersCollector


class MetricsRoute:
    """Renders the metrics of all workers in a thread, one scrape at a time.

    Args:
        settings: The service's.
        folder: Folder of the workers' files.
    """

    def __init__(self, settings: TokenizerSettings, folder: Path) -> None:
        workers = WorkersCollector(folder)
        collector = WithVllmNames(workers, "0", lambda: settings.served_name) if settings.vllm_metrics else workers
        self._registry = make_registry("tokenizer", [collector])
        self._turn = asyncio.Lock()

    def register(self, face: HttpFace, app: web.Application) -> None:
        """Add the route."""
        face.add(app, hdrs.METH_GET, "/metrics", self.metrics)

    async def metrics(self, call: HttpCall) -> web.StreamResponse:
        """All metrics, in Prometheus' text format."""
        async with self._turn:
            text = await asyncio.to_thread(generate_latest, self._registry)
        return web.Response(body=text, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})
