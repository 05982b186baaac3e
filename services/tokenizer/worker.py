"""A worker process: one event loop, a link to each scheduler, all public services on the shared port.

Started by the supervisor as `python -m scalellm.services.tokenizer.worker`. Its assignment is one JSON line on
stdin, which then stays open as long as the supervisor lives; it reports in JSON lines on stdout.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import uvloop
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from scalellm.services.common import model_store
from scalellm.services.common.access import Access, open_access
from scalellm.services.common.addresses import join_address
from scalellm.services.common.json_lines import read_line, write_line
from scalellm.services.common.lifecycle import LAST_WORDS, GrpcService, StartError, stop_event
from scalellm.services.common.logs import configure_logging
from scalellm.services.common.metrics import LoopLag
from scalellm.services.common.redis_client import open_redis
from scalellm.services.common.redis_health import RedisWatch
from scalellm.services.common.served_models import ServedModel
from scalellm.services.common.tls import server_credentials
from scalellm.services.common.tracing import open_tracer
from scalellm.services.tokenizer.aliases import Aliases
from scalellm.services.tokenizer.call_bytes import CallBytes
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.generation.edges import Edges
from scalellm.services.tokenizer.generation.grpc_face import GenerationServicer
from scalellm.services.tokenizer.http.build import make_listener
from scalellm.services.tokenizer.http.listener import HttpListener
from scalellm.services.tokenizer.kept.journal import Journal
from scalellm.services.tokenizer.kept.kept_requests import KeptRequests
from scalellm.services.tokenizer.limits import MAX_ANSWER_BYTES, RequestLimits
from scalellm.services.tokenizer.metrics import EdgeMetrics
from scalellm.services.tokenizer.prompt_builder import PromptBuilder
from scalellm.services.tokenizer.quotas import TenantQuotas
from scalellm.services.tokenizer.request_log import RequestLog
from scalellm.services.tokenizer.rpc import CallGate, add_service
from scalellm.services.tokenizer.running_request import Move
from scalellm.services.tokenizer.sampling_defaults import read_sampling_defaults
from scalellm.services.tokenizer.schedulers import Schedulers
from scalellm.services.tokenizer.session_store import SessionStore
from scalellm.services.tokenizer.sessions_servicer import SessionsServicer
from scalellm.services.tokenizer.text.loading import load_model_tokenizer
from scalellm.services.tokenizer.text.model_tokenizer import UnsupportedTokenizerError
from scalellm.services.tokenizer.tokenizer_servicer import TokenizerServicer
from scalellm.v1 import common_pb2, generation_pb2, sessions_pb2, tokenizer_pb2

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer

_log = logging.getLogger("scalellm.services.tokenizer")

_SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"],
    tokenizer_pb2.DESCRIPTOR.services_by_name["Tokenizer"],
    sessions_pb2.DESCRIPTOR.services_by_name["Sessions"],
)


_QUOTA_TIMEOUT = 0.25
_REDIS_INTERVAL = 2.0
_METRICS_INTERVAL = 0.5
_KEPT_LEASE = 3.0
"""Seconds after which another worker takes over the kept requests of one that died."""


class Worker:
    """Serves until it is told to stop, then drains.

    Args:
        settings: Settings of the service.
        port: The port that the supervisor reserved.
        http_port: The port that it reserved for HTTP; None: HTTP is not served.
        tracer: Makes spans; None = traces are off.
    """

    def __init__(self, settings: TokenizerSettings, port: int, http_port: int | None, tracer: Tracer | None) -> None:
        self._settings = settings
        self._port = port
        self._http_port = http_port
        self._tracer = tracer
        self._gate = CallGate()
        self._names = [model.name for model in settings.served_models]
        self._metrics = EdgeMetrics(CollectorRegistry(), self._names)

    async def run(self) -> None:
        """Serve. Raises StartError."""
        settings = self._settings
        stop = stop_event()
        supervisor_gone = await _watch_stdin()
        settings.dialer.check()
        access = open_access(settings, serves_links=False)
        aliases = Aliases(settings.aliases, self._names)
        models = [_Model.load(model, settings) for model in settings.served_models]
        redis = open_redis(settings.redis_url) if settings.redis_url else None
        sessions = SessionStore(
            redis, settings.session_ttl_s, max_bytes=settings.max_session_bytes, refused=self._metrics.count_limited
        )
        watch = _watch_redis(redis) if redis is not None else None
        worker_id = f"tokenizer-{os.getpid()}-{os.urandom(4).hex()}"
        # Quotas have connections of their own with shorter timeouts, because every limited request waits for them.
        quota_redis = open_redis(settings.redis_url, timeout=_QUOTA_TIMEOUT) if settings.redis_url else None
        quotas = TenantQuotas(quota_redis, worker_id, refused=self._metrics.count_limited)
        journal = None
        if redis is not None:
            journal = Journal(
                redis, worker_id, ttl=settings.kept_ttl_s, lease=_KEPT_LEASE, max_bytes=settings.max_kept_bytes
            )
        kept = KeptRequests(journal, self._gate, _KEPT_LEASE)
        edges, limits, request_log = Edges(aliases), RequestLimits(), RequestLog(settings)
        async with AsyncExitStack() as stack:
            for model in models:
                edges.add(
                    Edge(
                        models=edges,
                        model_name=model.name,
                        model_metrics=self._metrics.models[model.name],
                        prompts=await stack.enter_async_context(model.prompts),
                        tokenizer_size=model.prompts.model.vocab_size,  # computed now, because it takes 0.1 s
                        schedulers=self._schedulers(model, worker_id, model.name if len(models) > 1 else ""),
                        kept=kept,
                        sessions=sessions,
                        limits=limits,
                        metrics=self._metrics,
                        salt_secret=settings.salt_secret,
                        access=access,
                        quotas=quotas,
                        request_log=request_log,
                        tracer=self._tracer,
                        sampling_defaults=model.sampling_defaults,
                    )
                )
            edge = edges.default
            held = CallBytes()
            is_ready = partial(self._is_ready, edges, access)
            service = GrpcService(
                settings.host,
                self._port,
                services=[descriptor.full_name for descriptor in _SERVICES],
                is_ready=is_ready,
                share_port=True,
                options=(
                    *settings.connection_options,
                    ("grpc.max_receive_message_length", edge.limits.max_request_bytes),
                    ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
                ),
                credentials=server_credentials(settings.tls_files),
                interceptors=access.interceptors,
            )
            servicers = (
                GenerationServicer(edge),
                TokenizerServicer(edge),
                SessionsServicer(sessions, access, settings.session_ttl_s, edge.limits),
            )

            # The first service counts tokens, and therefore admits its calls itself.
            admits = (None, quotas.admitted, quotas.admitted)
            on_end = self._metrics.count_call
            for descriptor, servicer, admit in zip(_SERVICES, servicers, admits, strict=True):
                add_service(service.server, descriptor, servicer, self._gate, on_end, held, access.tenant, admit)
            http: HttpListener | None = None
            if self._http_port is not None:
                http = make_listener(edge, settings, self._http_port, self._gate, held, on_end, is_ready)
            self._follow(edges, kept, sessions, access, quotas)
            lag = LoopLag(self._metrics.loop_lag.observe)
            links = [each.schedulers.run() for each in edges]
            gauges = self._keep_gauges(edges, aliases, kept, access, quotas, held, watch)
            waits = (*links, stop.wait(), supervisor_gone.wait(), lag.run(), quotas.run(), kept.run(), gauges)
            tasks = [asyncio.create_task(step) for step in waits]
            if watch is not None:
                tasks.append(asyncio.create_task(watch.run()))
            try:
                # The vocabulary lives as long as the process, so the garbage collector need not scan it again. Messages
                # form no reference cycles, so a collection after every 700 allocations is wasted time.
                gc.collect()
                gc.freeze()
                gc.set_threshold(20_000)
                await service.start()
                if http is not None:
                    await http.start()
                _report(serving=service.address)
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done():  # the worker failed, and its caller reports the error
                        task.result()
                if stop.is_set():
                    await self._drain(service, edges, kept)
            finally:
                await service.stop(LAST_WORDS if stop.is_set() else 0.0)
                if http is not None:
                    await http.stop()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await sessions.close()
                await quotas.close()
                self._metrics.flush()

    def _schedulers(self, model: _Model, worker_id: str, asked_for: str) -> Schedulers:
        settings = self._settings
        return Schedulers(
            settings.scheduler_addresses,
            worker_id,
            model.prompts.model.sha256,
            silence_limit=settings.stall_limit_s,
            outage_limit=settings.scheduler_outage_s,
            resolve_interval=settings.scheduler_resolve_s,
            dialer=settings.dialer,
            model=asked_for,
            service=join_address(socket.gethostname(), self._port),
        )

    def _follow(
        self, edges: Edges, kept: KeptRequests, sessions: SessionStore, access: Access, quotas: TenantQuotas
    ) -> None:
        metrics, links = self._metrics, [edge.schedulers for edge in edges]
        for edge in edges:
            metrics.follow(edge.model_metrics.generation_tokens, partial(getattr, edge.schedulers.counts, "tokens"))
        metrics.follow(metrics.discarded_tokens, lambda: sum(link.counts.discarded_tokens for link in links))
        for move, counter in metrics.resubmitted.items():
            metrics.follow(counter, partial(_num_resubmitted, links, move))
        metrics.follow(metrics.frames_sent, lambda: sum(link.counts.traffic.frames_sent for link in links))
        metrics.follow(metrics.frames_received, lambda: sum(link.counts.traffic.frames_received for link in links))
        metrics.follow(metrics.bytes_sent, lambda: sum(link.counts.traffic.bytes_sent for link in links))
        metrics.follow(metrics.bytes_received, lambda: sum(link.counts.traffic.bytes_received for link in links))
        metrics.follow(metrics.tokenizer_panics, lambda: sum(edge.prompts.num_panics for edge in edges))
        metrics.follow(metrics.refused_calls, lambda: access.num_refused)
        metrics.follow(metrics.redis_failures, lambda: sessions.num_failures + quotas.num_failures + kept.num_failures)
        if self._tracer is not None:
            metrics.follow_tracer(self._tracer)

    async def _keep_gauges(
        self,
        edges: Edges,
        aliases: Aliases,
        kept: KeptRequests,
        access: Access,
        quotas: TenantQuotas,
        held: CallBytes,
        watch: RedisWatch | None,
    ) -> None:
        """Write the metrics to the worker's files, and check files of keys and aliases for changes, until cancelled."""
        metrics, links = self._metrics, [edge.schedulers for edge in edges]
        while True:
            metrics.flush()
            metrics.limits_unshared.set(quotas.is_degraded)
            metrics.keys_unread.set(access.is_failing)
            metrics.aliases_unread.set(aliases.is_failing)
            metrics.call_bytes.set(held.num_bytes)
            metrics.largest_call_bytes.set(held.largest_bytes)
            metrics.call_bytes_limit.set(held.max_tenant_bytes)
            metrics.redis_unusable.set(watch is not None and not watch.is_up)
            metrics.links_up.set(sum(link.num_up for link in links))
            metrics.waiting.set(sum(link.num_waiting for link in links))
            metrics.tell_schedulers(_total(link.num_sent for link in links), _total(link.num_running for link in links))
            metrics.kept.set(kept.num_running)
            metrics.kept_unwritten.set(kept.num_unwritten)
            metrics.tasks.set(len(asyncio.all_tasks()))
            await asyncio.sleep(_METRICS_INTERVAL)

    def _is_ready(self, edges: Edges, access: Access) -> bool:
        is_able = any(edge.schedulers.num_up for edge in edges) and all(edge.prompts.is_working for edge in edges)
        return is_able and not access.is_stale and not self._gate.is_closed

    async def _drain(self, service: GrpcService, edges: Edges, kept: KeptRequests) -> None:
        limit = self._settings.drain_limit_s
        _log.info("draining for up to %g s", limit)
        draining = asyncio.create_task(self._gate.drain(limit))
        await asyncio.sleep(0)  # let the drain close the gate first
        await service.health.publish()
        if remaining := await draining:
            _log.warning("%d calls did not finish in time and end with UNAVAILABLE", remaining)
            stopping = asyncio.create_task(kept.stop())
            await asyncio.sleep(0)  # let the kept requests end first: their clients are told to resume
            for edge in edges:  # so that clients get a status instead of a broken connection
                edge.schedulers.end_all("the server is shutting down")
            await stopping


def _watch_redis(redis: Redis) -> RedisWatch:
    return RedisWatch(redis, sessions=True, without="sessions cannot be used", interval=_REDIS_INTERVAL)


@dataclass(frozen=True, slots=True)
class _Model:
    """The files of a model that the edge needs, loaded."""

    name: str
    prompts: PromptBuilder
    sampling_defaults: common_pb2.SamplingParams

    @classmethod
    def load(cls, model: ServedModel, settings: TokenizerSettings) -> _Model:
        try:
            path = model_store.resolve(model.source, settings.home)
            prompts = PromptBuilder(load_model_tokenizer(path))
        except (model_store.ModelStoreError, UnsupportedTokenizerError) as error:
            raise StartError(f"--model: {error}") from None
        reads = settings.generation_config == "auto"
        return cls(model.name, prompts, read_sampling_defaults(path) if reads else common_pb2.SamplingParams())


def _num_resubmitted(links: Sequence[Schedulers], move: Move) -> int:
    return sum(link.num_resubmitted[move] for link in links)


def _total(all_counts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for counts in all_counts:
        total.update(counts)
    return total


async def _watch_stdin() -> asyncio.Event:
    """Return an event that is set when stdin ends, because the supervisor is gone."""
    ended = asyncio.Event()

    class Protocol(asyncio.Protocol):
        def connection_lost(self, error: Exception | None) -> None:
            ended.set()

    await asyncio.get_running_loop().connect_read_pipe(Protocol, sys.stdin)
    return ended


def _report(**values: str) -> None:
    write_line(sys.stdout.buffer, values)


def main() -> int:
    """Read the assignment and serve. Returns the exit code."""
    assignment = read_line(sys.stdin.buffer)
    if assignment is None:  # the supervisor ended before it sent the assignment
        return 1
    settings = TokenizerSettings.model_validate(assignment["settings"])
    configure_logging("tokenizer", settings)
    try:
        with open_tracer("tokenizer", settings, settings.trace_sample_ratio) as tracer:
            uvloop.run(Worker(settings, assignment["port"], assignment["http_port"], tracer).run())
    except StartError as error:
        _report(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
