"""The choice of requests that are logged, and the content of a log line."""

from __future__ import annotations

import logging

import grpc
import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.common.settings import load_settings
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.request_log import RequestEnd, RequestLog
from scalellm.v1 import common_pb2, generation_pb2

MARKER = "marmalade"
CHAT = generation_pb2.GenerateRequest(
    chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=MARKER)])
)


def end(error: StatusError | None = None, request: generation_pb2.GenerateRequest = CHAT) -> RequestEnd:
    latency = common_pb2.LatencyBreakdown(total_ns=2_500_000, ttft_ns=1_000_000, executor_id="host:50061")
    return RequestEnd(request, error, latency, common_pb2.Usage(prompt_tokens=3, completion_tokens=4))


def written(settings: TokenizerSettings, *ends: RequestEnd) -> list[logging.LogRecord]:
    log, records = RequestLog(settings), []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("scalellm.services.tokenizer.requests")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        for item in ends:
            if log.wants(item.error):
                log.write(item)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return records


def test_by_default_only_our_own_failures() -> None:
    codes = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
    records = written(TokenizerSettings(), end(), *(end(StatusError(code, "why")) for code in codes))
    ours = {"DATA_LOSS", "FAILED_PRECONDITION", "INTERNAL", "UNAVAILABLE", "UNKNOWN"}
    assert {record.code for record in records} == ours
    assert {record.levelname for record in records} == {"WARNING"}
    assert {record.error for record in records} == {"why"}


def test_an_outage_does_not_flood() -> None:
    records = written(TokenizerSettings(), *[end(StatusError.unavailable("no executor"))] * 1000)
    assert len(records) == 10


def test_all_requests_without_their_text() -> None:
    refused = end(StatusError.invalid("request_id", f"must be short, got {MARKER!r}"))
    ok, bad = written(TokenizerSettings(log_requests=True), end(), refused)
    assert ok.getMessage() == (
        "request ended OK: e2e_ms 2.5, prompt_tokens 3, completion_tokens 4, ttft_ms 1.0, executor host:50061"
    )
    assert (ok.levelname, ok.code, ok.e2e_ms, ok.ttft_ms, ok.completion_tokens) == ("INFO", "OK", 2.5, 1.0, 4)
    assert bad.getMessage().endswith("field request_id")
    assert MARKER not in str(ok.__dict__) + str(bad.__dict__)


def test_prompts_where_asked_for_and_cut() -> None:
    inputs = [
        CHAT,
        generation_pb2.GenerateRequest(prompt=MARKER + "\n" * 10_000),
        generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=range(10_000))),
    ]
    settings = TokenizerSettings(log_requests=True, log_prompts=True)
    chat, prompt, tokens = (record.prompt for record in written(settings, *(end(request=item) for item in inputs)))
    assert chat == f'[{{"role": "user", "content": "{MARKER}"}}]'
    assert prompt.startswith(f'"{MARKER}\\n')
    assert tokens.startswith("[0, 1, 2, ")
    assert max(map(len, (chat, prompt, tokens))) <= 4096 + 3


def test_prompts_need_request_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(TokenizerSettings, ["--log-prompts"])
    assert (
        "--log-prompts (SCALELLM_TOKENIZER_LOG_PROMPTS): Value error, needs --log-requests" in capsys.readouterr().err
    )
