"""Variables of the processes that compute: the network interface on which ranks meet is that of the group's address."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from scalellm.services.executor.engine_environment import engine_environment

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1"])
def test_ranks_of_one_host_stay_on_it(host: str) -> None:
    environment = engine_environment({}, host)
    assert [environment[name] for name in VARIABLES] == ["lo", "lo"]


def test_ranks_of_several_hosts_meet_where_others_reach_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    address = SimpleNamespace(family=socket.AF_INET, address="192.0.2.7")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "ib0": [address]})
    assert [engine_environment({}, "192.0.2.7")[name] for name in VARIABLES] == ["ib0", "ib0"]
    with pytest.raises(OSError, match=r"no network interface has the address 192\.0\.2\.8"):
        engine_environment({}, "192.0.2.8")


def test_an_operator_chooses_another_interface() -> None:
    environment = engine_environment(dict.fromkeys(VARIABLES, "eth7"), "127.0.0.1")
    assert [environment[name] for name in VARIABLES] == ["eth7", "eth7"]
