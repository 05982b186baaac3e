"""The state of an instance, from its processes, health services and request counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import psutil

from scalellm.client import Credentials
from scalellm.launcher.credentials import service_credentials, with_link_token
from scalellm.launcher.errors import NotRunningError
from scalellm.launcher.health import Probe
from scalellm.launcher.instance import EXECUTOR, REDIS, SCHEDULER, TOKENIZER, Instance, ServiceRecord, State
from scalellm.launcher.processes import find, last_error
from scalellm.launcher.redis_server import check_redis, shown
from scalellm.launcher.supervision import supervisor_of
from scalellm.services.common.health_check import SERVING
from scalellm.v1.executor_pb2 import GetExecutorInfoResponse
from scalellm.v1.scheduler_pb2 import ExecutorPhase

_NOTHING: Mapping[str, str] = MappingProxyType({})
_EXPECTED = (REDIS, EXECUTOR, SCHEDULER, TOKENIZER)


@dataclass(frozen=True, slots=True)
class Restarts:
    """Restarts of a service: their number; when (seconds since the epoch) and how it ended the last time."""

    count: int = 0
    last_end: float | None = None
    last_reason: str = ""

    @classmethod
    def of(cls, record: ServiceRecord) -> Restarts:
        """Return the restarts that a service's record has."""
        return cls(record.restarts, record.ended_at or None, record.reason)

    def __str__(self) -> str:
        if self.last_end is None:
            return ""
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.last_end))
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"restarted {times}; it last ended at {at}: {self.last_reason}"


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One service. `health` is `serving`, or what is wrong; `load` is empty when the service did not say.

    `pid`, `uptime_s` and `memory_bytes` (resident, with children) are None without a process of ours. An executor says
    with `compute` where and in what its model runs, with `weights` in what form the weights are and what other one they
    could have, with `speculation` if tokens are guessed (on, off, idle), with `instructions` which of the CPU's
    instructions the C++ kernels use and why not stronger ones, and with `kernels` which form each op has.
    """

    name: str
    kind: str
    health: str
    address: str
    metrics_address: str = ""
    pid: int | None = None
    uptime_s: float | None = None
    memory_bytes: int | None = None
    model: str = ""
    compute: str = ""
    weights: str = ""
    speculation: str = ""
    instructions: str = ""
    kernels: Mapping[str, str] = field(default_factory=dict)
    load: Mapping[str, int] = field(default_factory=dict)
    last_error: str = ""
    log: str = ""
    restarts: Restarts = Restarts()


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """An instance. Both addresses are host:port; `model` has the names of all models, with commas in between.

    `healthy` is True when every service is there and serving; `supervised`, while somebody starts again what ends.
    """

    instance: str
    model: str
    address: str
    http_address: str
    healthy: bool
    supervised: bool
    services: tuple[ServiceStatus, ...]


def read_status(instance: Instance, environment: Mapping[str, str] = _NOTHING) -> InstanceStatus:
    """Ask every service how it is; takes a few seconds at most. Raises NotRunningError when nothing was started.

    Args:
        instance: The instance.
        environment: Environment that names the credentials for secured services, as for `up`.
    """
    state = instance.load()
    if state is None:
        raise NotRunningError(f"not running (instance {instance.name!r})")
    environment = with_link_token(instance, environment)
    records = [record for kind in _EXPECTED for record in state.of_kind(kind)]
    with ThreadPoolExecutor(max_workers=len(records) + 1) as pool:
        services = list(pool.map(lambda record: _read_service(record, state, environment), records))
        if not state.of_kind(REDIS):
            services.insert(0, _read_redis(ServiceStatus(REDIS, REDIS, SERVING, shown(state.redis_url)), state))
    complete = {service.kind for service in services} == set(_EXPECTED)
    return InstanceStatus(
        instance=instance.name,
        model=state.model,
        address=state.public_address,
        http_address=state.http_address,
        healthy=complete and all(service.health == SERVING for service in services),
        supervised=supervisor_of(state) is not None,
        services=tuple(services),
    )


def _read_service(record: ServiceRecord, state: State, environment: Mapping[str, str]) -> ServiceStatus:
    process = find(record)
    history = Restarts.of(record)
    if process is None:
        health, error = _absence(record, state)
        return ServiceStatus(
            record.name,
            record.kind,
            health,
            record.address,
            last_error=error,
            log=record.log,
            restarts=history,
        )
    status = ServiceStatus(
        name=record.name,
        kind=record.kind,
        health=SERVING,
        address=record.address,
        metrics_address=record.metrics_address,
        pid=record.pid,
        uptime_s=max(0.0, time.time() - record.create_time),
        memory_bytes=_memory(process),
        log=record.log,
        restarts=history,
    )
    if record.kind == REDIS:
        return _read_redis(status, state)
    if not record.address:
        return replace(status, health="starting")
    return _read_grpc(status, service_credentials(record.kind, environment))


def _absence(record: ServiceRecord, state: State) -> tuple[str, str]:
    """The health of a service that does not run, and why it does not."""
    if record.given_up:
        return "given up", f"{record.given_up}; try again with: scalellm up"
    error = last_error(record.log) or "it left no reason in its log (killed?)"
    return "restarting" if supervisor_of(state) else "crashed", error


def _read_redis(status: ServiceStatus, state: State) -> ServiceStatus:
    health = check_redis(state.redis_url)
    if health.error:
        return replace(status, health="not usable" if health.answers else "unreachable", last_error=health.error)
    return replace(status, load={"keys": health.keys, "used_memory_bytes": health.used_memory})


def _read_grpc(status: ServiceStatus, credentials: Credentials) -> ServiceStatus:
    with Probe(status.address, credentials) as probe:
        health = probe.health()
        error = "" if health == SERVING else last_error(status.log)
        model, compute, weights, speculation, instructions, load = "", "", "", "", "", {}
        kernels: dict[str, str] = {}
        if health == "unreachable":
            pass
        elif status.kind == EXECUTOR and (info := probe.executor()):
            model, kernels = info.model, dict(info.kernels)
            ranks = f"{info.tensor_parallel} ranks" if info.tensor_parallel > 1 else ""
            compute = ", ".join(filter(None, (ranks, info.device, info.dtype, info.quantization, info.backend)))
            weights, speculation, instructions = _weights(info), info.speculation, _instructions(info)
            if info.late_compiles:
                error = error or f"{info.late_compiles} kernels were compiled while requests waited"
            load = {
                "running": info.load.running,
                "waiting": info.load.waiting,
                "free_blocks": info.load.free_blocks,
                "total_blocks": info.load.total_blocks,
            }
        elif status.kind == SCHEDULER and (books := probe.scheduler()):
            ready = [executor for executor in books.executors if executor.phase == ExecutorPhase.EXECUTOR_PHASE_READY]
            load = {
                "running": books.running,
                "queued": books.queued,
                "executors_ready": len(ready),
                "executors": len(books.executors),
            }
            missing = [executor for executor in books.executors if executor.last_error and executor not in ready]
            error = error or "; ".join(executor.last_error for executor in missing)
        elif status.kind == TOKENIZER and (served := probe.tokenizer()):
            model = ", ".join(served.models) or served.model
    return replace(
        status,
        health=health,
        model=model,
        compute=compute,
        weights=weights,
        speculation=speculation,
        instructions=instructions,
        kernels=kernels,
        load=load,
        last_error=error,
    )


def _weights(info: GetExecutorInfoResponse) -> str:
    """The form of the weights, and what another --quantization would make of them."""
    if not info.HasField("weights"):
        return ""
    text = f"{info.weights.type}, {info.weights.bytes / 2**20:.0f} MiB"
    if info.HasField("other_weights"):
        other = info.other_weights
        text += f" (--quantization {other.quantization}: {other.type}, {other.bytes / 2**20:.0f} MiB)"
    return text


def _instructions(info: GetExecutorInfoResponse) -> str:
    """The instructions of the C++ kernels, and the reasons why stronger ones are not used."""
    reasons = "; ".join(f"not {level}: {reason}" for level, reason in info.unused_instructions.items())
    return f"{info.instructions} ({reasons})" if reasons else info.instructions


def _memory(process: psutil.Process) -> int | None:
    try:
        family = (process, *process.children(recursive=True))
        return sum(member.memory_info().rss for member in family)
    except psutil.Error:
        return None
