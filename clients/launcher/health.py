"""Asking services how they are, with a bounded wait."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scalellm.client.credentials import NO_CREDENTIALS, Credentials
from scalellm.services.common.health_check import SERVING
from scalellm.v1 import executor_pb2, executor_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc, tokenizer_pb2
from scalellm.v1 import tokenizer_pb2_grpc as tokenizer_grpc

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # A service that is starting is asked often; gRPC would wait longer from failure to failure.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
)


class Probe:
    """A connection to one service for asking about its state. Use it in a `with` block.

    Args:
        address: host:port.
        credentials: For a service that is secured.
        timeout: Longest wait for an answer, in seconds.
    """

    def __init__(self, address: str, credentials: Credentials = NO_CREDENTIALS, timeout: float = 2.0) -> None:
        self._channel = credentials.open_channel(address, _OPTIONS)
        self._metadata = credentials.metadata
        self._timeout = timeout

    def health(self) -> str:
        """`serving`, `not serving`, or why there is no answer."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout).status
        except grpc.RpcError as error:
            return "no answer" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else "unreachable"
        return SERVING if status == health_pb2.HealthCheckResponse.SERVING else "not serving"

    def executor(self) -> executor_pb2.GetExecutorInfoResponse | None:
        """Return an executor's state; None when it does not answer."""
        stub = executor_pb2_grpc.ExecutorStub(self._channel)  # type: ignore[no-untyped-call]
        info: executor_pb2.GetExecutorInfoResponse | None = self._ask(
            stub.GetInfo, executor_pb2.GetExecutorInfoRequest()
        )
        return info

    def scheduler(self) -> scheduler_pb2.GetStateResponse | None:
        """Return a scheduler's state; None when it does not answer."""
        stub = scheduler_pb2_grpc.SchedulerStub(self._channel)  # type: ignore[no-untyped-call]
        state: scheduler_pb2.GetStateResponse | None = self._ask(stub.GetState, scheduler_pb2.GetStateRequest())
        return state

    def tokenizer(self) -> tokenizer_pb2.GetInfoResponse | None:
        """Return a tokenizer's state; None when it does not answer."""
        stub = tokenizer_grpc.TokenizerStub(self._channel)  # type: ignore[no-untyped-call]
        info: tokenizer_pb2.GetInfoResponse | None = self._ask(stub.GetInfo, tokenizer_pb2.GetInfoRequest())
        return info

    def _ask(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError:
            return None

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()
