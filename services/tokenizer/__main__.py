"""Entry point: `python -m scalellm.services.tokenizer`."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from scalellm.services.common import model_store
from scalellm.services.common.addresses import join_address
from scalellm.services.common.entry import run_service
from scalellm.services.common.lifecycle import StartError, announce, stop_event
from scalellm.services.common.metrics import MetricsEndpoint
from scalellm.services.common.vllm_metrics import WithVllmNames
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.metrics import WorkersCollector
from scalellm.services.tokenizer.port import PortReservation
from scalellm.services.tokenizer.supervisor import Supervisor

_log = logging.getLogger("scalellm.services.tokenizer")


async def serve(settings: TokenizerSettings) -> None:
    """Serve until SIGTERM, then drain. Raises StartError."""
    stop = stop_event()
    try:
        for model in settings.served_models:
            model_store.resolve(model.source, settings.home)
    except model_store.ModelStoreError as error:
        raise StartError(f"--model: {error}") from None
    with ExitStack() as stack:
        reservation = PortReservation(settings.host, settings.port)
        stack.callback(reservation.close)
        lines = [join_address(settings.host, reservation.port)]
        http_port: int | None = None
        if settings.http:
            http = PortReservation(settings.host, settings.http_port, "--http-port")
            stack.callback(http.close)
            http_port = http.port
            lines.append(f"http={join_address(settings.host, http_port)}")
        if settings.metrics_port is None:
            supervisor = Supervisor(settings, reservation.port, http_port)
        else:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="scalellm-tokenizer-")))
            workers = WorkersCollector(folder)
            supervisor = Supervisor(settings, reservation.port, http_port, folder, workers.on_worker_crash)
            collector = WithVllmNames(workers, "0", lambda: settings.served_name) if settings.vllm_metrics else workers
            endpoint = MetricsEndpoint(
                settings.metrics_host,
                settings.metrics_port,
                "tokenizer",
                [collector],
                lambda: supervisor.worker_pids,
                settings.metrics_tls_files,
            )
            stack.callback(endpoint.stop)
            lines.append(f"metrics={endpoint.address}")

        def on_ready() -> None:
            where = f"{lines[0]} and by HTTP on port {http_port}" if http_port is not None else lines[0]
            names = " and ".join(model.name for model in settings.served_models)
            _log.info("serving %s on %s with %d workers", names, where, settings.workers)
            announce(settings.announce, *lines)
            if settings.announce is not None:
                stack.callback(settings.announce.unlink, missing_ok=True)

        running = asyncio.create_task(supervisor.run(on_ready))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await supervisor.stop()
            await running
        finally:
            stopping.cancel()
            running.cancel()
            await asyncio.gather(running, stopping, return_exceptions=True)


if __name__ == "__main__":
    run_service("tokenizer", TokenizerSettings, serve)
