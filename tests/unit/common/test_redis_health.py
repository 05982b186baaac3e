"""Faults of a Redis, on real ones that are set up wrongly: the start and the log say it, and what to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from scalellm.launcher.redis_server import check_redis
from scalellm.services.common.redis_client import open_redis
from scalellm.services.common.redis_health import REDIS_ERRORS, RedisFault, RedisWatch, probe_redis
from service_processes import PATIENCE, RedisProcess, eventually, start_redis

Start = Callable[..., RedisProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[RedisProcess] = []

    def start_one(*flags: str) -> RedisProcess:
        started.append(start_redis(tmp_path, *flags))
        return started[-1]

    yield start_one
    for redis in started:
        redis.stop()
        Path(redis.url.removeprefix("unix://")).unlink(missing_ok=True)


async def fault_of(url: str, *, sessions: bool = True) -> RedisFault | None:
    """Finding of the probe about a Redis; None: it does all that is needed."""
    async with open_redis(url, timeout=PATIENCE) as client:
        try:
            await probe_redis(client, sessions=sessions)
        except REDIS_ERRORS as error:
            return RedisFault.of(error)
    return None


def ask(redis: RedisProcess, *command: str) -> object:
    with Redis.from_url(redis.url) as client:
        return client.execute_command(*command)


async def test_one_that_does_all_keeps_nothing_of_the_probe(start: Start) -> None:
    redis = start("--maxmemory", "256mb", "--maxmemory-policy", "volatile-ttl")
    assert await fault_of(redis.url) is None
    assert ask(redis, "DBSIZE") == 0


async def test_a_replica(start: Start) -> None:
    redis = start("--replicaof", "127.0.0.1", "1")
    assert await fault_of(redis.url) is RedisFault.READ_ONLY
    ask(redis, "CONFIG", "SET", "replica-serve-stale-data", "no")
    assert await fault_of(redis.url) is RedisFault.READ_ONLY


async def test_users_that_may_not_do_all(start: Start) -> None:
    redis = start()
    rights = {
        "all": "~scalellm:* +@all -@admin -@dangerous",
        "scripts": "~scalellm:* +@all -@scripting",
        "hashes": "~scalellm:* +@all -hset",
        "keys": "~other:* +@all",
    }
    for user, may in rights.items():
        ask(redis, "ACL", "SETUSER", user, "on", ">secret", *may.split())
    found = {user: await fault_of(url_of(redis, user)) for user in rights}
    denied = RedisFault.PERMISSION
    assert found == {"all": None, "scripts": denied, "hashes": denied, "keys": denied}
    # The scheduler keeps single values, and needs no more.
    assert await fault_of(url_of(redis, "scripts"), sessions=False) is None
    assert await fault_of(url_of(redis, "keys"), sessions=False) is denied
    assert ask(redis, "DBSIZE") == 0


def url_of(redis: RedisProcess, user: str, password: str = "secret") -> str:
    return redis.url.replace("unix://", f"unix://{user}:{password}@")


async def test_passwords(start: Start) -> None:
    redis = start("--requirepass", "right")
    assert await fault_of(url_of(redis, "", "right")) is None
    assert await fault_of(redis.url) is RedisFault.PASSWORD
    assert await fault_of(url_of(redis, "", "wrong")) is RedisFault.PASSWORD


async def test_no_memory_left(start: Start) -> None:
    redis = start("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    assert await fault_of(redis.url) is RedisFault.NO_MEMORY
    assert await fault_of(redis.url, sessions=False) is RedisFault.NO_MEMORY


async def test_writes_that_cannot_be_kept(start: Start) -> None:
    assert await fault_of(start("--min-replicas-to-write", "1").url) is RedisFault.NO_DISK


async def test_a_database_that_is_not_there(start: Start) -> None:
    redis = start()
    assert await fault_of(f"{redis.url}?db=15") is None
    health = await asyncio.to_thread(check_redis, f"{redis.url}?db=16")
    assert health.answers
    assert "DB index is out of range" in health.error


async def test_nobody_and_somebody_who_does_not_answer(start: Start) -> None:
    assert await fault_of("unix:///nonexistent/socket") is RedisFault.UNREACHABLE
    redis = start()
    redis.pause()
    async with open_redis(redis.url, timeout=0.05) as client:
        with pytest.raises(REDIS_ERRORS) as error:
            await probe_redis(client, sessions=False)
        assert RedisFault.of(error.value) is RedisFault.SLOW


async def test_a_cluster_serves_when_one_address_has_all_keys(start: Start, free_port: int) -> None:
    flags = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", "--port", str(free_port))
    redis = start(*flags)
    assert await fault_of(redis.url) is RedisFault.CLUSTER
    ask(redis, "CLUSTER", "ADDSLOTS", *map(str, range(16384 // 2)))
    await eventually(lambda: b"cluster_state:ok" in ask(redis, "CLUSTER", "INFO"))
    assert await fault_of(redis.url) is RedisFault.CLUSTER
    ask(redis, "CLUSTER", "ADDSLOTS", *map(str, range(16384 // 2, 16384)))
    assert await fault_of(redis.url) is None


@pytest.fixture
def free_port() -> int:
    """A port whose neighbour 10000 above, the cluster's own, exists as well."""
    import socket

    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if (port := int(probe.getsockname()[1])) < 55000:
                return port


def test_up_says_what_to_do_about_each(start: Start) -> None:
    said = {
        "takes no writes, it is a replica": check_redis(start("--replicaof", "127.0.0.1", "1").url),
        "does not accept the service's password": check_redis(start("--requirepass", "right").url),
        "has no memory left": check_redis(start("--maxmemory", "1", "--maxmemory-policy", "noeviction").url),
    }
    for cause, health in said.items():
        assert health.answers
        assert health.error.startswith(f"Redis {cause}: ")
    health = check_redis(start().url)
    assert (health.error, health.version.split(".")[0] >= "6", health.keys) == ("", True, 0)


async def test_the_log_says_what_changes_and_nothing_twice(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    redis = start()
    async with open_redis(redis.url, timeout=PATIENCE) as client:
        watch = RedisWatch(client, sessions=True, without="sessions cannot be used", interval=0.01)
        running = asyncio.create_task(watch.run())
        await eventually(lambda: watch.is_up)
        ask(redis, "REPLICAOF", "127.0.0.1", "1")
        await eventually(lambda: watch.num_failures >= 3)
        assert not watch.is_up
        ask(redis, "REPLICAOF", "NO", "ONE")
        await eventually(lambda: watch.is_up)
        running.cancel()
        await asyncio.wait([running])
    lines = [(record.levelname, record.message) for record in caplog.records if "Redis" in record.message]
    assert [level for level, _ in lines] == ["INFO", "ERROR", "INFO"]
    assert lines[1][1].startswith("Redis takes no writes, it is a replica: ")
    assert lines[1][1].endswith("give the services the primary's address, sessions cannot be used")
