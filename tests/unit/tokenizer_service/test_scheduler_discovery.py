"""A worker's discovery of schedulers: addresses, names, and names that change."""

from __future__ import annotations

import asyncio
import socket

import pytest
from pydantic import ValidationError

from fake_scheduler_link import unconnected
from scalellm.services.common.link import LinkDialer
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.scheduler_discovery import SchedulerDiscovery
from scalellm.services.tokenizer.schedulers import Schedulers
from service_processes import PATIENCE


class Found:
    """Collects the addresses that a discovery reports."""

    def __init__(self) -> None:
        self.hosts: dict[str, str] = {}
        self.dropped: set[str] = set()

    def add(self, address: str, host: str) -> None:
        self.hosts[address] = host
        self.dropped.discard(address)

    def drop_when_down(self, address: str) -> None:
        self.dropped.add(address)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A name service that the test writes."""
    known: dict[str, list[str]] = {}

    async def getaddrinfo(self, host, port, **_):
        if host not in known:
            raise socket.gaierror("name not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in known[host]]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return known


async def test_names_are_looked_up_again_and_again(names: dict[str, list[str]]) -> None:
    names["pool"] = ["10.0.0.1", "10.0.0.2"]
    found = Found()
    discovery = SchedulerDiscovery(("pool:5", "10.0.0.9:5"), found, 0.001)
    running = asyncio.create_task(discovery.run())
    async with asyncio.timeout(PATIENCE):
        while len(found.hosts) < 3:
            await asyncio.sleep(0.001)
        assert found.hosts == {"10.0.0.1:5": "pool", "10.0.0.2:5": "pool", "10.0.0.9:5": "10.0.0.9"}
        del names["pool"]
        while not discovery.errors:
            await asyncio.sleep(0.001)
        assert "cannot look up pool:5: name not known" in discovery.errors["pool:5"]
        assert not found.dropped
        names["pool"] = ["10.0.0.2", "10.0.0.3"]
        while found.dropped != {"10.0.0.1:5"}:
            await asyncio.sleep(0.001)
        assert "10.0.0.3:5" in found.hosts
        assert not discovery.errors
    running.cancel()


async def test_certificates_are_those_of_the_listed_name() -> None:
    with unconnected():
        schedulers = Schedulers((), "test", b"", dialer=LinkDialer())
        schedulers.add("10.0.0.1:5", "pool")
        schedulers.add("10.0.0.2:5", "10.0.0.2")
        named = Schedulers((), "test", b"", dialer=LinkDialer(tls_name="line"))
        named.add("10.0.0.1:5", "pool")
    links = [*schedulers._links.values(), *named._links.values()]
    assert [link._client._dialer.tls_name for link in links] == ["pool", "", "line"]


def test_settings() -> None:
    assert TokenizerSettings(scheduler=" a:1, b:2,").scheduler_addresses == ("a:1", "b:2")
    for bad in ("a:1,b", "", ","):
        with pytest.raises(ValidationError, match="host:port"):
            TokenizerSettings(scheduler=bad)
