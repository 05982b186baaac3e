"""Entry point: `python -m scalellm.services.executor`."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client.registry import Collector

from scalellm.services.common.access import Access, open_access
from scalellm.services.common.entry import run_service
from scalellm.services.common.histogram import LAG_SECONDS, Histogram
from scalellm.services.common.lifecycle import LAST_WORDS, GrpcService, StartError, announce, stop_event
from scalellm.services.common.link import link_service_handler
from scalellm.services.common.metrics import LoopLag, MetricsEndpoint
from scalellm.services.common.tls import server_credentials
from scalellm.services.common.tracing import open_tracer
from scalellm.services.common.vllm_metrics import WithVllmNames
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine_supervisor import EngineSupervisor
from scalellm.services.executor.front import SERVICE, ExecutorServicer
from scalellm.services.executor.metrics import ExecutorCollector
from scalellm.services.executor.nodes.service import serve_node
from scalellm.services.executor.request_trace import record

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer

_log = logging.getLogger("scalellm.services.executor")


async def serve(settings: ExecutorSettings) -> None:
    """Serve until SIGTERM, then drain. Raises StartError."""
    if settings.node_rank >= settings.nodes:
        raise StartError(f"--node-rank {settings.node_rank}: must be less than --nodes, {settings.nodes}")
    if settings.node_rank > 0:
        await serve_node(settings)
        return
    with open_tracer("executor", settings) as tracer:
        await _serve_traced(settings, tracer)


async def _serve_traced(settings: ExecutorSettings, tracer: Tracer | None) -> None:
    stop = stop_event()
    supervisor = EngineSupervisor(settings, partial(record, tracer) if tracer is not None else None)
    access = open_access(settings, serves_links=True)
    service = GrpcService(
        settings.host,
        settings.port,
        services=(SERVICE.full_name,),
        is_ready=lambda: supervisor.is_ready and not access.is_stale,
        options=settings.connection_options,
        credentials=server_credentials(settings.tls_files),
        interceptors=access.interceptors,
    )
    handler = link_service_handler(SERVICE, ExecutorServicer(supervisor, settings))
    service.server.add_generic_rpc_handlers((handler,))
    metrics, loop_lag = None, Histogram(LAG_SECONDS)
    if settings.metrics_port is not None:
        metrics = _metrics_endpoint(settings, settings.metrics_port, supervisor, access, loop_lag, tracer)
    await service.start()
    lines = [service.address]
    if metrics is not None:
        lines.append(f"metrics={metrics.address}")

    def on_ready() -> None:
        _log.info("serving %s on %s", supervisor.info.model, service.address)

    running = asyncio.create_task(supervisor.run(on_ready))
    stopping = asyncio.create_task(stop.wait())
    watching = asyncio.create_task(LoopLag(loop_lag.observe).run())
    try:
        announce(settings.announce, *lines)  # links that are opened while the model is being loaded wait for it
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        _log.info("draining for up to %g s", settings.drain_limit_s)
        if remaining := await supervisor.drain(settings.drain_limit_s):
            _log.info("%d requests did not finish in time and go on elsewhere", remaining)
            if lost := await supervisor.give_back():
                _log.warning("%d requests could not be given back and are dropped", lost)
    finally:
        running.cancel()
        stopping.cancel()
        watching.cancel()
        await asyncio.gather(running, stopping, watching, return_exceptions=True)
        await service.stop(LAST_WORDS)
        if metrics is not None:
            metrics.stop()
        if settings.announce is not None:
            settings.announce.unlink(missing_ok=True)


def _metrics_endpoint(
    settings: ExecutorSettings,
    port: int,
    supervisor: EngineSupervisor,
    access: Access,
    loop_lag: Histogram,
    tracer: Tracer | None,
) -> MetricsEndpoint:
    collector: Collector = ExecutorCollector(supervisor, access, loop_lag)
    if settings.vllm_metrics:
        collector = WithVllmNames(collector, "0", lambda: supervisor.info.model)

    def processes() -> dict[str, int]:
        engine = {"engine": supervisor.engine_pid} if supervisor.engine_pid is not None else {}
        return engine | {f"rank-{rank}": pid for rank, pid in supervisor.rank_pids.items()}

    tls = settings.metrics_tls_files
    return MetricsEndpoint(settings.metrics_host, port, "executor", [collector], processes, tls, tracer)


if __name__ == "__main__":
    run_service("executor", ExecutorSettings, serve)
