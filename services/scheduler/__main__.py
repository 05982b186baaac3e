"""Entry point: `python -m services.scheduler`."""

from __future__ import annotations

import asyncio
import logging
import sys

from services.common.lifecycle import StartError, announce, configure_logging, stop_event
from services.common.settings import load_settings
from services.scheduler.config import SchedulerSettings
from services.scheduler.server import SchedulerServer


async def _serve(settings: SchedulerSettings) -> None:
    stop = stop_event()
    server = SchedulerServer(settings)
    await server.start()
    logging.getLogger(__name__).info("listening on %s", server.address)
    metrics = [f"metrics={server.metrics_address}"] if server.metrics_address is not None else []
    announce(settings.announce, server.address, *metrics)
    try:
        await stop.wait()
        await server.stop()
    finally:
        if settings.announce is not None:
            settings.announce.unlink(missing_ok=True)


def main() -> int:
    """Run the scheduler until it is told to stop. Returns the exit status."""
    settings = load_settings(SchedulerSettings)
    configure_logging("scheduler", settings.log_level)
    try:
        asyncio.run(_serve(settings))
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
