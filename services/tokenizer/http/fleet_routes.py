"""/v1/fleet: the current state of the deployment, once or every second."""

from __future__ import annotations

import os
from pathlib import Path

from aiohttp import hdrs, web

from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.fleet.snapshot import Snapshots
from scalellm.services.tokenizer.fleet.watch import FleetWatch
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.event_stream import EventStream
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.rpc import CallGate


class FleetRoutes:
    """Serves the state of the deployment.

    Args:
        watch: Takes snapshots.
        gate: Closed while the worker drains, which ends the streams, as they never end by themselves.
    """

    def __init__(self, watch: FleetWatch, gate: CallGate) -> None:
        self._watch = watch
        self._gate = gate

    def register(self, face: HttpFace, app: web.Application) -> None:
        """Add the route."""
        face.add(app, hdrs.METH_GET, "/v1/fleet", self.fleet)

    async def fleet(self, call: HttpCall) -> web.StreamResponse:
        """Return a snapshot, or with `stream=true` one per second until the client leaves or the worker drains."""
        async with self._watch.watching() as following:
            if call.request.query.get("stream", "").lower() not in ("true", "1"):
                return web.Response(body=await following(), content_type="application/json")
            snapshot = await following()
            call.stream = EventStream(call.request)
            await call.stream.open()
            while not self._gate.is_closed:
                await call.stream.write(b"data: " + snapshot + b"\n\n")
                snapshot = await following()
            await call.stream.close()
            return call.stream.response


def make_fleet_watch(edge: Edge, settings: TokenizerSettings) -> FleetWatch:
    """Make the FleetWatch of one worker."""
    # The folder that the supervisor set for prometheus_client, if there are metrics.
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    has_metrics = settings.metrics_port is not None and folder is not None
    snapshots = Snapshots(
        edge.models.names, settings.workers, edge.schedulers, Path(folder) if has_metrics and folder else None
    )
    return FleetWatch(snapshots.take, snapshots.forget)
