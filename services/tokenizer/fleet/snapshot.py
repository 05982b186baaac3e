"""Snapshots of the deployment's state, as JSON."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from scalellm import __version__
from scalellm.services.common.metric_window import Scrape, Window, samples_of
from scalellm.services.tokenizer.fleet.states import SchedulerStates, State
from scalellm.services.tokenizer.metrics import WorkersCollector
from scalellm.services.tokenizer.schedulers import Schedulers
from scalellm.v1 import scheduler_pb2

_WINDOW = 10.0
_MOST_EXECUTORS = 256
"""Most executors of one scheduler in a snapshot, which stays below about 100 KB."""

_MOST_CLIENTS = 64
"""Most tokenizer services of one scheduler in a snapshot."""

_PHASES: Mapping[int, str] = MappingProxyType(
    {
        scheduler_pb2.EXECUTOR_PHASE_CONNECTING: "connecting",
        scheduler_pb2.EXECUTOR_PHASE_READY: "ready",
        scheduler_pb2.EXECUTOR_PHASE_DRAINING: "draining",
        scheduler_pb2.EXECUTOR_PHASE_INCOMPATIBLE: "incompatible",
    }
)
_TIMES: Mapping[str, str] = MappingProxyType(
    {
        "queue_ms": "scalellm_request_queue_time_seconds",
        "ttft_ms": "scalellm_time_to_first_token_seconds",
        "itl_ms": "scalellm_inter_token_latency_seconds",
        "e2e_ms": "scalellm_e2e_request_latency_seconds",
    }
)
_REQUEST_RATES: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType(
    {
        "accepted_per_s": ("scalellm_tokenizer_requests_accepted_total", {}),
        "cancelled_per_s": ("scalellm_tokenizer_requests_ended_total", {"outcome": "cancelled"}),
        "rejected_per_s": ("scalellm_tokenizer_requests_ended_total", {"outcome": "rejected"}),
    }
)
_MODEL_RATES: Mapping[str, str] = MappingProxyType(
    {
        "prompt_tokens_per_s": "scalellm_prompt_tokens_total",
        "generation_tokens_per_s": "scalellm_generation_tokens_total",
        "finished_per_s": "scalellm_e2e_request_latency_seconds_count",
    }
)


class Snapshots:
    """Takes snapshots: the counts of this service's workers over the last ten seconds, and the schedulers' states.

    Args:
        models: Names of the models that are served, the default first.
        num_workers: Workers of this service.
        schedulers: The schedulers of this service.
        folder: Folder of its workers' metrics; None: there are no metrics.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        models: Sequence[str],
        num_workers: int,
        schedulers: Schedulers,
        folder: Path | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._num_workers = num_workers
        self._schedulers = schedulers
        self._collector = WorkersCollector(folder) if folder is not None else None
        self._clock = clock
        self._states = SchedulerStates()
        self._scrapes: deque[Scrape] = deque()

    async def take(self) -> bytes:
        """Return a snapshot."""
        states, figures = await asyncio.gather(self._states.read(self._schedulers.dialers), self._figures())
        tokenizer = {
            "service": self._schedulers.service,
            "models": list(self._models),
            "version": __version__,
            "workers": self._num_workers,
            **figures,
        }
        snapshot = {
            "object": "fleet",
            "at": round(time.time(), 3),
            "window_s": _WINDOW,
            "tokenizer": tokenizer,
            "schedulers": [scheduler_json(address, state) for address, state in sorted(states.items())],
        }
        return json.dumps(snapshot, separators=(",", ":"), allow_nan=False).encode()

    async def forget(self) -> None:
        """Forget the counts, since nobody watches, so that the next snapshot begins a new window."""
        self._scrapes.clear()
        await self._states.close()

    async def _figures(self) -> dict[str, object]:
        if self._collector is None:
            return {"figures": None, "model_figures": {}}
        samples = samples_of(await asyncio.to_thread(self._collector.collect))
        self._scrapes.append(Scrape("", self._clock(), samples))
        while len(self._scrapes) > 2 and self._scrapes[1].at < self._scrapes[-1].at - _WINDOW:
            self._scrapes.popleft()
        window = Window([self._scrapes[0]], [self._scrapes[-1]])
        several = self._models if len(self._models) > 1 else ()
        return {
            "figures": window_figures(window),
            "model_figures": {model: model_figures(window, model_name=model) for model in several},
        }


def window_figures(window: Window) -> dict[str, object]:
    """Return the figures of a tokenizer. A figure that is not known, or without events in the window, is None."""
    figures: dict[str, object] = {"running": _number(window.gauge("scalellm_tokenizer_requests_running"))}
    figures |= {name: _number(window.rate(metric, **labels)) for name, (metric, labels) in _REQUEST_RATES.items()}
    return figures | model_figures(window)


def model_figures(window: Window, **labels: str) -> dict[str, object]:
    """Return the figures of one model, which `labels` choose, or without labels those of all models together."""
    figures: dict[str, object] = {name: _number(window.rate(metric, **labels)) for name, metric in _MODEL_RATES.items()}
    for name, histogram in _TIMES.items():
        ranks = {f"p{rank}": _number(1e3 * window.quantile(histogram, rank / 100, **labels)) for rank in (50, 90, 99)}
        figures[name] = ranks if ranks["p50"] is not None else None
    return figures


def scheduler_json(address: str, state: State) -> dict[str, object]:
    """Return the part of a snapshot about a scheduler and its executors."""
    if isinstance(state, str):
        return {"address": address, "error": state}
    # Executors that need attention come first, in case there are too many to list.
    executors = sorted(
        state.executors,
        key=lambda executor: (executor.phase == scheduler_pb2.EXECUTOR_PHASE_READY, executor.address),
    )
    phases = Counter(_PHASES.get(executor.phase, "unknown") for executor in executors)
    return {
        "address": address,
        "instance_id": state.instance_id,
        "queued": state.queued,
        "queued_tokens": state.queued_tokens,
        "running": state.running,
        "accepted": state.accepted,
        "finished": state.finished,
        "cancelled": state.cancelled,
        "rejected": state.rejected,
        "resubmitted": state.resubmitted,
        "draining": state.draining,
        "redis_ok": state.redis_ok,
        "num_executors": len(executors),
        "phases": dict(phases),
        "models": [{"model": model.model, "queued": model.queued, "running": model.running} for model in state.models],
        "clients": [
            {"service": client.service, "workers": client.workers, "running": client.running}
            for client in state.clients[:_MOST_CLIENTS]
        ],
        "executors": [_executor_json(executor) for executor in executors[:_MOST_EXECUTORS]],
    }


def _executor_json(executor: scheduler_pb2.ExecutorState) -> dict[str, object]:
    load = executor.load
    return {
        "address": executor.address,
        "model": executor.model,
        "instance_id": executor.instance_id,
        "phase": _PHASES.get(executor.phase, "unknown"),
        "running": executor.running,
        "waiting": load.waiting,
        "kv_usage": round(1 - load.free_blocks / load.total_blocks, 4) if load.total_blocks else None,
        "tokens": executor.tokens,
        "tensor_parallel": executor.tensor_parallel,
        "last_error": executor.last_error,
    }


def _number(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
