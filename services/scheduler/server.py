"""Builds the parts of the scheduler, starts and stops them."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from prometheus_client.registry import Collector

from scalellm.services.common.access import open_access
from scalellm.services.common.errors import StatusError
from scalellm.services.common.histogram import LAG_SECONDS, Histogram
from scalellm.services.common.lifecycle import LAST_WORDS, GrpcService
from scalellm.services.common.link import link_service_handler
from scalellm.services.common.metrics import LoopLag, MetricsEndpoint
from scalellm.services.common.tls import server_credentials
from scalellm.services.common.vllm_metrics import WithVllmNames
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.dispatcher import Dispatcher
from scalellm.services.scheduler.dispatchers import Dispatchers
from scalellm.services.scheduler.executor_discovery import ExecutorDiscovery
from scalellm.services.scheduler.external_scaler import SERVICE as SCALER_SERVICE
from scalellm.services.scheduler.external_scaler import ExternalScaler
from scalellm.services.scheduler.metrics import SchedulerCollector
from scalellm.services.scheduler.scaling import Scaling
from scalellm.services.scheduler.service import SERVICE, SchedulerService

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer


class SchedulerServer:
    """One scheduler. `start`, then `stop`; on one event loop.

    Args:
        settings: Settings of the service.
        tracer: Makes spans; None = traces are off.
    """

    def __init__(self, settings: SchedulerSettings, tracer: Tracer | None = None) -> None:
        self._settings = settings
        self._tracer = tracer
        self._instance_id = uuid.uuid4().hex
        self._affinity = AffinityStore(settings.redis_url, settings.session_ttl_s)
        self.dispatchers = Dispatchers(
            lambda: Dispatcher(settings, self._instance_id, self._affinity, tracer, settings.dialer)
        )
        self._discovery = ExecutorDiscovery(self.dispatchers, settings.executor_resolve_s)
        self.scaling = Scaling(self.dispatchers, lambda: self._discovery.names, asyncio.get_running_loop().time)
        self.service = SchedulerService(
            self._instance_id,
            settings.drain_limit_s,
            self.dispatchers,
            self._discovery,
            self._affinity,
            settings.lease_s,
        )
        settings.dialer.check()
        self._access = open_access(settings, serves_links=True)
        self._grpc = GrpcService(
            settings.host,
            settings.port,
            services=[SERVICE.full_name, SCALER_SERVICE.full_name],
            is_ready=self._is_ready,
            options=settings.connection_options,
            credentials=server_credentials(settings.tls_files),
            interceptors=self._access.interceptors,
        )
        handlers = (
            link_service_handler(SERVICE, self.service),
            link_service_handler(SCALER_SERVICE, ExternalScaler(self.scaling)),
        )
        self._grpc.server.add_generic_rpc_handlers(handlers)
        self._metrics: MetricsEndpoint | None = None
        self._loop_lag = Histogram(LAG_SECONDS)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        """host:port at which the service listens. Valid after `start`."""
        return self._grpc.address

    @property
    def metrics_address(self) -> str | None:
        """host:port of the Prometheus endpoint, if there is one."""
        return self._metrics.address if self._metrics is not None else None

    async def start(self) -> None:
        """Listen and connect to the executors. Raises StartError."""
        if self._settings.metrics_port is not None:
            self._metrics = self._metrics_endpoint(self._settings.metrics_port)
        await self._grpc.start()
        self.dispatchers.start()
        self._tasks = [
            asyncio.create_task(self._affinity.run(), name="affinity"),
            asyncio.create_task(self._discovery.run(), name="discovery"),
            asyncio.create_task(self.scaling.run(), name="scaling"),
            asyncio.create_task(LoopLag(self._loop_lag.observe).run(), name="loop lag"),
        ]
        await self._discovery.add(self._settings.executor_addresses)

    async def stop(self) -> None:
        """Drain within the limit, then end the remaining requests and close everything."""
        self.dispatchers.begin_drain()
        await self.dispatchers.wait_idle(self._settings.drain_limit_s)
        self.dispatchers.end_all(StatusError.unavailable("the scheduler stopped", retry_after=1.0), moved=True)
        await self._grpc.stop(LAST_WORDS)
        await self.dispatchers.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._metrics is not None:
            # In a thread, because stopping waits for a scrape under way, and that scrape waits for this event loop.
            await asyncio.to_thread(self._metrics.stop)

    def _metrics_endpoint(self, port: int) -> MetricsEndpoint:
        collector: Collector = SchedulerCollector(
            asyncio.get_running_loop(),
            self.service.get_state,
            self.dispatchers,
            self.scaling,
            self._affinity,
            self._access,
            self._loop_lag,
        )
        if self._settings.vllm_metrics:
            # Queued requests have no engine yet; label them engine="scheduler".
            collector = WithVllmNames(collector, "scheduler")
        settings, tracer = self._settings, self._tracer
        return MetricsEndpoint(
            settings.metrics_host, port, "scheduler", [collector], tls=settings.metrics_tls_files, tracer=tracer
        )

    def _is_ready(self) -> bool:
        return self.dispatchers.is_ready and not self._access.is_stale and not self.dispatchers.is_draining
