"""Entry point: `python -m scalellm.services.scheduler`."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

from scalellm.services.common.entry import run_service
from scalellm.services.common.lifecycle import announce, stop_event
from scalellm.services.common.tracing import open_tracer
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.server import SchedulerServer

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer


async def _serve(settings: SchedulerSettings) -> None:
    with open_tracer("scheduler", settings) as tracer:
        await _serve_traced(settings, tracer)


async def _serve_traced(settings: SchedulerSettings, tracer: Tracer | None) -> None:
    stop = stop_event()
    server = SchedulerServer(settings, tracer)
    await server.start()
    # Messages form no reference cycles, so a collection after every 700 allocations is wasted time (as in tokenizer
    # workers).
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    logging.getLogger(__name__).info("listening on %s", server.address)
    metrics = [f"metrics={server.metrics_address}"] if server.metrics_address is not None else []
    try:
        announce(settings.announce, server.address, *metrics)
        await stop.wait()
    finally:
        await server.stop()
        if settings.announce is not None:
            settings.announce.unlink(missing_ok=True)


if __name__ == "__main__":
    run_service("scheduler", SchedulerSettings, _serve)
