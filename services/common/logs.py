"""Log lines of all services, as text for people or JSON for collectors. Each contains the request that it belongs to.

No log line contains the text of a prompt or an answer, unless `--log-prompts` is set.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TextIO

from scalellm.services.common.child_environment import SERVICE_LOG
from scalellm.services.common.log_file import BoundedLog

if TYPE_CHECKING:
    from scalellm.services.common.settings import ServiceSettings

_log = logging.getLogger(__name__)

LogFormat = Literal["text", "json"]


@dataclass(slots=True)
class RequestFields:
    """The fields of every line that is logged for a request. Unknown values are empty.

    Attributes:
        request_id: The request's id.
        trace_id: Id of its trace, 32 hexadecimal digits.
        tenant: The tenant of the request.
    """

    request_id: str = ""
    trace_id: str = ""
    tenant: str = ""


request_fields: ContextVar[RequestFields | None] = ContextVar("request_fields", default=None)
"""The request that the current task works for. Its fields may be filled in after it was set."""

_NAMES = tuple(field.name for field in fields(RequestFields))


def configure_logging(service: str, settings: ServiceSettings) -> None:
    """Log to standard error in the format of the settings. If `scalellm up` made the log file, it is rotated."""
    handler = log_handler(service, settings.log_format, sys.stderr)
    if log := os.environ.get(SERVICE_LOG):
        handler.addFilter(BoundedLog(Path(log)))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    # grpc.aio logs every value of metadata that is not UTF-8, such as a mistyped key, with a traceback and before keys
    # are checked. Errors of our handlers are logged by `guarded`.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    if settings.log_format == "json":
        _log_what_python_prints()


def log_handler(service: str, log_format: LogFormat, stream: TextIO) -> logging.Handler:
    """Return the handler that writes the lines of a service."""
    handler = logging.StreamHandler(stream)
    handler.addFilter(_add_request_fields)
    handler.setFormatter(log_formatter(service, log_format))
    return handler


def log_formatter(service: str, log_format: LogFormat) -> logging.Formatter:
    """Return the formatter of a service's lines."""
    return _json_formatter(service) if log_format == "json" else _TextFormatter(service)


def tell_errors(service: str, log_format: LogFormat, errors: Iterable[str]) -> None:
    """Print the reasons why a service cannot start, in its log format. Works before logging is set up."""
    handler = log_handler(service, log_format, sys.stderr)
    for error in errors:
        if log_format == "json":
            handler.handle(logging.LogRecord(_log.name, logging.CRITICAL, "", 0, error, None, None))
        else:
            print(f"error: {error}", file=sys.stderr)


def _log_what_python_prints() -> None:
    """Log uncaught exceptions and warnings as JSON, because a collector of JSON cannot read Python's own output."""
    logging.captureWarnings(True)

    def on_exception(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        _log.critical("the process ends: %r", value, exc_info=(kind, value, traceback))

    def on_thread_exception(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            _log.critical("a thread ends: %r", args.exc_value, exc_info=args.exc_value)

    def on_unraisable(args: sys.UnraisableHookArgs) -> None:
        _log.error("ignored in %r: %r", args.object, args.exc_value, exc_info=args.exc_value)

    sys.excepthook = on_exception
    threading.excepthook = on_thread_exception
    sys.unraisablehook = on_unraisable


def _add_request_fields(record: logging.LogRecord) -> bool:
    """Add the fields of the current request to a record, except those that the caller gave as `extra`."""
    request = request_fields.get()
    if request is not None:
        for name in _NAMES:
            if value := getattr(request, name):
                record.__dict__.setdefault(name, value)
    return True


class _TextFormatter(logging.Formatter):
    """One line, the request's fields at its end."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {service}[%(process)d] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        known = [f"{name}={value}" for name in _NAMES if (value := record.__dict__.get(name))]
        return f"{line} [{' '.join(known)}]" if known else line


def _json_formatter(service: str) -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter  # imported only if it is used

    return JsonFormatter(
        ["levelname", "process", "name", "message"],
        rename_fields={"levelname": "level", "process": "pid", "name": "logger"},
        static_fields={"service": service},
        timestamp=True,
    )


class LineLimit:
    """Limits the rate of log lines, and counts the suppressed ones, so that a failing dependency cannot flood the log.

    Args:
        lines: Most lines per interval.
        seconds: Length of an interval.
        clock: Monotonic seconds.
    """

    def __init__(self, lines: int = 10, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = lines
        self._seconds = seconds
        self._clock = clock
        self._began = clock()
        self._passed = 0
        self._held_back = 0

    def admit(self) -> int | None:
        """Return the number of lines suppressed since the last one that passed; None: this line is suppressed, too."""
        now = self._clock()
        if now - self._began >= self._seconds:
            self._began, self._passed = now, 0
        if self._passed >= self._lines:
            self._held_back += 1
            return None
        self._passed += 1
        held_back, self._held_back = self._held_back, 0
        return held_back
