"""Environment variables of the processes that compute: the engine's and its ranks'."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

import psutil

from scalellm.services.common.child_environment import child_environment

_LOOPBACK = "lo"


def engine_environment(environment: Mapping[str, str], local_host: str = "127.0.0.1") -> dict[str, str]:
    """Return the environment: without secrets, and with OpenMP threads that sleep instead of spinning while they wait.

    On a CPU the other services run beside the engine, and a matrix product on spinning threads becomes very slow beside
    any busy process, because its threads wait for one that is not running. torch reads these variables at import.

    Args:
        environment: This process's own, which overrides the defaults.
        local_host: IP address by which ranks on other hosts reach this host.
    """
    interface = _interface_of(local_host)
    defaults = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}
    defaults |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return defaults | child_environment(environment)


def _interface_of(host: str) -> str:
    """Return the network interface that has an IP address."""
    if ipaddress.ip_address(host).is_loopback:
        return _LOOPBACK
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host for address in addresses):
            return name
    raise OSError(f"no network interface has the address {host}")
