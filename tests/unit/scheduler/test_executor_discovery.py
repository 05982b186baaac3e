"""ExecutorDiscovery: names, addresses, and what happens when they change."""

import asyncio
import socket

import pytest

from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.executor_discovery import ExecutorDiscovery
from service_processes import PATIENCE


class Fleet:
    def __init__(self):
        self.present: set[str] = set()
        self.leaving: set[str] = set()
        self.dropped: set[str] = set()

    def add(self, address):
        self.present.add(address)
        self.leaving.discard(address)
        self.dropped.discard(address)

    def remove(self, address):
        self.leaving.add(address)

    def drop_when_down(self, address):
        self.dropped.add(address)


@pytest.fixture
def names(monkeypatch):
    """A name service that the test writes."""
    known: dict[str, list[str]] = {}

    async def getaddrinfo(self, host, port, **_):
        if host not in known:
            raise socket.gaierror("name not known")
        families = {ip: socket.AF_INET6 if ":" in ip else socket.AF_INET for ip in known[host]}
        return [(family, socket.SOCK_STREAM, 6, "", (ip, port)) for ip, family in families.items()]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return known


def test_settings_refuse_bad_executors():
    assert SchedulerSettings(executors=" a:1, b:2,").executor_addresses == ("a:1", "b:2")
    with pytest.raises(ValueError, match="'b' is not host:port"):
        SchedulerSettings(executors="a:1,b")


async def test_a_name_stands_for_its_addresses_of_one_family(names):
    names["pool"] = ["10.0.0.1", "10.0.0.2", "fd00::1"]
    names["six"] = ["fd00::2"]
    fleet = Fleet()
    await ExecutorDiscovery(fleet, 1.0).add(["pool:5", "six:5", "127.0.0.1:7"])
    assert fleet.present == {"10.0.0.1:5", "10.0.0.2:5", "[fd00::2]:5", "127.0.0.1:7"}


async def test_changes_are_followed_and_failures_are_not(names):
    names["pool"] = ["10.0.0.1", "10.0.0.2"]
    fleet = Fleet()
    discovery = ExecutorDiscovery(fleet, 0.001)
    await discovery.add(["pool:5"])
    running = asyncio.create_task(discovery.run())
    names["pool"] = ["10.0.0.2", "10.0.0.3"]
    async with asyncio.timeout(PATIENCE):
        while fleet.dropped != {"10.0.0.1:5"}:
            await asyncio.sleep(0.001)
        assert fleet.present == {"10.0.0.1:5", "10.0.0.2:5", "10.0.0.3:5"}
        del names["pool"]
        while not discovery.errors:
            await asyncio.sleep(0.001)
        assert "name not known" in discovery.errors["pool:5"]
        assert fleet.dropped == {"10.0.0.1:5"}
        names["pool"] = ["10.0.0.1"]
        while discovery.errors or fleet.dropped != {"10.0.0.2:5", "10.0.0.3:5"}:
            await asyncio.sleep(0.001)
    running.cancel()


async def test_removal(names):
    names["pool"] = ["10.0.0.1", "10.0.0.2"]
    fleet = Fleet()
    discovery = ExecutorDiscovery(fleet, 0.001)
    await discovery.add(["pool:5", "10.0.0.2:5"])
    assert not discovery.remove("other:5")
    assert discovery.remove("10.0.0.2:5")  # the name still stands for it
    assert fleet.leaving == set()
    assert discovery.remove("10.0.0.1:5")
    assert fleet.leaving == {"10.0.0.1:5"}
    assert not discovery.remove("10.0.0.1:5")
    running = asyncio.create_task(discovery.run())
    await asyncio.sleep(0.01)
    assert fleet.leaving == {"10.0.0.1:5"}  # not taken back by the next look-up
    running.cancel()
    await discovery.add(["pool:5"])  # taken back by whoever lists it again
    assert fleet.leaving == set()
    assert discovery.remove("pool:5")
    assert fleet.leaving == {"10.0.0.1:5", "10.0.0.2:5"}


async def test_a_name_that_is_listed_again_brings_back_what_was_removed_from_it(names):
    names["pool"] = ["10.0.0.1"]
    fleet = Fleet()
    discovery = ExecutorDiscovery(fleet, 0.001)
    await discovery.add(["pool:5"])
    assert discovery.remove("10.0.0.1:5")
    assert discovery.remove("pool:5")
    assert fleet.leaving == {"10.0.0.1:5"}
    await discovery.add(["pool:5"])
    assert fleet.leaving == set()
