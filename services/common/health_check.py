"""`python -m services.common.health_check HOST:PORT`: exits with 0 if a service is serving, else with 1 and the reason.

What a container's health check runs, every few seconds: so it imports little.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = "serving"

_TIMEOUT = 3.0


def read_health(channel: grpc.Channel, timeout: float) -> str:
    """`serving`, `not serving`, or why there is no answer within `timeout` seconds."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        status = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout).status
    except grpc.RpcError as error:
        return "no answer" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else "unreachable"
    return SERVING if status == health_pb2.HealthCheckResponse.SERVING else "not serving"


def main(address: str) -> int:
    """Ask the service at `address`, say what it answers, and return the exit code."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        health = read_health(channel, _TIMEOUT)
    print(f"{address}: {health}")
    return health != SERVING


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
