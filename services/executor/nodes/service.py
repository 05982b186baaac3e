"""The executor service of a node other than 0, which serves no requests but only health checks and metrics."""

from __future__ import annotations

import asyncio
import logging

from scalellm.services.common.access import open_access
from scalellm.services.common.lifecycle import GrpcService, announce, stop_event
from scalellm.services.common.metrics import MetricsEndpoint
from scalellm.services.common.tls import server_credentials
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.nodes.follower import NodeFollower, NodeState

_log = logging.getLogger(__name__)


async def serve_node(settings: ExecutorSettings) -> None:
    """Keep the node in its group until SIGTERM, then wait up to --drain-limit-s for the group to end. Raises
    StartError.
    """
    stop = stop_event()
    follower = NodeFollower(settings)
    service = GrpcService(
        settings.host,
        settings.port,
        services=(),
        is_ready=lambda: follower.state is not NodeState.WAITING,
        options=settings.connection_options,
        credentials=server_credentials(settings.tls_files),
        interceptors=open_access(settings, serves_links=True).interceptors,
    )
    metrics = None
    if settings.metrics_port is not None:
        metrics = MetricsEndpoint(
            settings.metrics_host,
            settings.metrics_port,
            "executor",
            [],
            lambda: {f"rank-{rank}": pid for rank, pid in follower.rank_pids.items()},
            settings.metrics_tls_files,
        )
    await service.start()
    lines = [service.address] if metrics is None else [service.address, f"metrics={metrics.address}"]
    running, stopping = asyncio.create_task(follower.run()), asyncio.create_task(stop.wait())
    try:
        announce(settings.announce, *lines)
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        if follower.state is NodeState.SERVING:
            _log.info("waiting up to %g s for the group to end", settings.drain_limit_s)
            await follower.until_idle(settings.drain_limit_s)
    finally:
        running.cancel()
        stopping.cancel()
        await asyncio.gather(running, stopping, return_exceptions=True)
        await service.stop(0)
        if metrics is not None:
            metrics.stop()
        if settings.announce is not None:
            settings.announce.unlink(missing_ok=True)
