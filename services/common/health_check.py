"""`python -m services.common.health_check HOST:PORT`: exits with 0 if a service is serving, else with 1 and the reason.

What a container's health check runs, every few seconds: so it imports little. Against a listener with TLS, variables
name PEM files and the name in the service's certificate, where that is not the address: SCALELLM_HEALTH_TLS_CA, _CERT
and _KEY (where clients have to show one) and _NAME.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.reload import ConfigFileError
from services.common.tls import TlsFiles, channel_credentials

SERVING = "serving"

_TIMEOUT = 3.0
_VARIABLES = "SCALELLM_HEALTH_TLS"


def read_health(channel: grpc.Channel, timeout: float) -> str:
    """`serving`, `not serving`, or why there is no answer within `timeout` seconds."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        status = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout).status
    except grpc.RpcError as error:
        return "no answer" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else "unreachable"
    return SERVING if status == health_pb2.HealthCheckResponse.SERVING else "not serving"


def main(address: str, environment: Mapping[str, str]) -> int:
    """Ask the service at `address`, say what it answers, and return the exit code."""
    try:
        with _open_channel(address, environment) as channel:
            health = read_health(channel, _TIMEOUT)
    except ConfigFileError as error:
        health = str(error)
    print(f"{address}: {health}")
    return health != SERVING


def _open_channel(address: str, environment: Mapping[str, str]) -> grpc.Channel:
    cert, key, ca = (
        Path(path) if (path := environment.get(f"{_VARIABLES}_{name}")) else None for name in ("CERT", "KEY", "CA")
    )
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    credentials = channel_credentials(TlsFiles(cert, key, ca, option=_VARIABLES))
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    if name := environment.get(f"{_VARIABLES}_NAME"):
        options.append(("grpc.ssl_target_name_override", name))
    return grpc.secure_channel(address, credentials, options=options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], os.environ))
