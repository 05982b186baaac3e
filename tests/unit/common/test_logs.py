"""Log lines: what they carry, and how many get through."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

import pytest

from clients.launcher.processes import last_error, last_message
from services.common.logs import LineLimit, RequestFields, log_handler, request_fields
from services.common.settings import ServiceSettings


class Lines:
    """A logger that writes as a service does, and what it wrote."""

    def __init__(self, service: str, log_format: Literal["text", "json"]) -> None:
        self._stream = io.StringIO()
        self.log = logging.Logger("services.test", logging.INFO)
        self.log.addHandler(log_handler(service, ServiceSettings(log_format=log_format), self._stream))

    def text(self) -> str:
        return self._stream.getvalue()


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    token = request_fields.set(None)
    yield
    request_fields.reset(token)


def test_json_lines_carry_the_request() -> None:
    lines = Lines("tokenizer", "json")
    log = lines.log
    log.info("before %s", "it")
    fields = RequestFields(trace_id="0af7651916cd43dd8448eb211c80319c")
    request_fields.set(fields)
    fields.request_id, fields.tenant = "req-1", "acme"
    log.warning("on its behalf\nin two lines", extra={"ttft_ms": 1.5})
    log.error("for another", extra={"request_id": "req-2"})
    try:
        raise KeyError("gone")
    except KeyError:
        log.exception("failed")
    log.debug("not shown")
    first, second, third, fourth = (json.loads(line) for line in lines.text().splitlines())
    timestamp = first.pop("timestamp")
    assert datetime.fromisoformat(timestamp).utcoffset() is not None
    own = {"level": "INFO", "service": "tokenizer", "pid": os.getpid(), "logger": "services.test"}
    assert first == {**own, "message": "before it"}
    ids = {"request_id": "req-1", "trace_id": "0af7651916cd43dd8448eb211c80319c", "tenant": "acme"}
    assert second.items() >= {**ids, "message": "on its behalf\nin two lines", "ttft_ms": 1.5}.items()
    assert third.items() >= {**ids, "request_id": "req-2"}.items()
    assert "KeyError: 'gone'" in fourth["exc_info"]


def test_text_lines_end_with_the_request() -> None:
    lines = Lines("scheduler", "text")
    log = lines.log
    log.info("nobody's")
    request_fields.set(RequestFields(request_id="req-1", tenant="acme"))
    log.info("somebody's")
    first, second = lines.text().splitlines()
    assert first.endswith(f" INFO scheduler[{os.getpid()}] services.test: nobody's")
    assert second.endswith("services.test: somebody's [request_id=req-1 tenant=acme]")


def test_status_reads_json_lines(tmp_path) -> None:
    lines = Lines("executor", "json")
    log = lines.log
    log.info("loading the weights")
    log.error("out of memory")
    path = tmp_path / "executor.log"
    path.write_text(lines.text())
    assert last_message(str(path)) == "loading the weights"
    assert last_error(str(path)).endswith(f"ERROR executor[{os.getpid()}] services.test: out of memory")


def test_a_flood_is_counted_not_written() -> None:
    now = 0.0
    limit = LineLimit(lines=2, seconds=10.0, clock=lambda: now)
    assert [limit.admit() for _ in range(5)] == [0, 0, None, None, None]
    now = 9.9
    assert limit.admit() is None
    now = 10.0
    assert [limit.admit() for _ in range(3)] == [4, 0, None]
