"""Log lines: what they carry, and how many get through."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

import pytest

from scalellm.launcher.processes import last_error, last_message
from scalellm.services.common.logs import LineLimit, RequestFields, log_handler, request_fields
from service_processes import PATIENCE


class Lines:
    """A logger that writes as a service does, and what it wrote."""

    def __init__(self, service: str, log_format: Literal["text", "json"]) -> None:
        self._stream = io.StringIO()
        self.log = logging.Logger("services.test", logging.INFO)
        self.log.addHandler(log_handler(service, log_format, self._stream))

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


PROGRAM = """
import asyncio, sys, threading, warnings, weakref
from scalellm.services.common.entry import run_service
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.settings import ServiceSettings, settings_config

class Settings(ServiceSettings):
    model_config = settings_config("test")

async def serve(settings):
    warnings.warn("old")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    doomed = type("Doomed", (), {"__del__": lambda self: {}["gone"]})()
    del doomed
    asyncio.get_running_loop().call_soon(lambda: [].pop())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    raise {"StartError": StartError, "OSError": OSError}[settings.host]("as asked")

run_service("test", Settings, serve)
"""


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--host", "StartError"], ["no TLS, no keys", "old", "division", "gone", "pop from empty list", "as asked"]),
        (["--host", "OSError"], ["no TLS, no keys", "old", "division", "gone", "pop from empty list", "as asked"]),
        (
            ["--port", "-1", "--stall-limit-s", "x"],
            ["--port (SCALELLM_TEST_PORT): ", "(SCALELLM_TEST_STALL_LIMIT_S): "],
        ),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_in_json_mode_all_of_standard_error_is_json(arguments: list[str], messages: list[str]) -> None:
    command = [sys.executable, "-c", PROGRAM, "--log-format", "json", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert result.returncode != 0
    entries = [json.loads(line) for line in result.stderr.splitlines()]
    said = [entry["message"] + entry.get("exc_info", "") for entry in entries]
    for line, message in zip(said, messages, strict=True):
        assert message in line


def test_a_flood_is_counted_not_written() -> None:
    now = 0.0
    limit = LineLimit(lines=2, seconds=10.0, clock=lambda: now)
    assert [limit.admit() for _ in range(5)] == [0, 0, None, None, None]
    now = 9.9
    assert limit.admit() is None
    now = 10.0
    assert [limit.admit() for _ in range(3)] == [4, 0, None]
