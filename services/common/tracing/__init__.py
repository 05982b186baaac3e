"""Traces of requests across the services, which are on if an exporter is configured.

Most spans of a request are made at its end, from times that are measured anyway; only spans with children in other
services are begun while it runs. Below the edge a request is traced if and only if its Submit says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scalellm.services.common.tracing.headers import TraceHeaders

if TYPE_CHECKING:
    from scalellm.services.common.settings import ServiceSettings
    from scalellm.services.common.tracing.tracer import Tracer

__all__ = ["TraceHeaders", "open_tracer"]


@contextmanager
def open_tracer(service: str, settings: ServiceSettings, sample_ratio: float = 0.0) -> Iterator[Tracer | None]:
    """Context with a service's tracer; None if traces are off. The remaining spans are exported at its end.

    Args:
        service: Name of the service.
        settings: Settings that name the exporter.
        sample_ratio: Share of traced requests, of those that come without a traceparent.

    Raises StartError.
    """
    if not settings.is_tracing:
        yield None
        return
    # OpenTelemetry is imported only where it is used.
    from scalellm.services.common.tracing.tracer import Tracer

    tracer = Tracer(service, settings, sample_ratio)
    try:
        yield tracer
    finally:
        tracer.close()
