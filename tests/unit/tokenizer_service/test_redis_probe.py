"""The probe of a Redis tries all that the services do with it."""

from __future__ import annotations

import asyncio

from redis import Redis

from scalellm.services.common.api_keys import Tenant, TenantLimits
from scalellm.services.common.redis_client import open_redis
from scalellm.services.common.redis_health import probe_redis
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.tokenizer.quotas import TenantQuotas
from scalellm.services.tokenizer.session import new_session
from scalellm.services.tokenizer.session_store import SessionStore
from service_processes import PATIENCE, RedisProcess, eventually

OF_THE_TEST = {"config|resetstat", "config", "info", "client|setinfo", "client", "hello", "select", "auth"}


def commands(redis: Redis) -> set[str]:
    """Commands that Redis has run since it was last asked, in scripts as well."""
    done = {name.removeprefix("cmdstat_").lower() for name in redis.info("commandstats")}
    redis.config_resetstat()
    return done - OF_THE_TEST


async def test_every_command_of_the_services_is_tried(redis_process: RedisProcess) -> None:
    observer = Redis.from_url(redis_process.url)
    observer.config_resetstat()

    async with open_redis(redis_process.url, timeout=PATIENCE) as client:
        await probe_redis(client, sessions=True)
        tried = commands(observer)
        await probe_redis(client, sessions=False)
        tried_for_the_scheduler = commands(observer)

    sessions = SessionStore(open_redis(redis_process.url), ttl=100.0, timeout=PATIENCE)
    for _ in range(2):
        await sessions.save("s", new_session())
    await sessions.create("t", new_session())
    await sessions.load("s")
    await sessions.list(1, "")
    await sessions.delete("s")
    await sessions.close()
    limits = TenantLimits(concurrent_requests=9, requests_per_minute=100, tokens_per_minute=1000)
    quotas = TenantQuotas(open_redis(redis_process.url, timeout=PATIENCE), "worker")
    running = asyncio.create_task(quotas.run())
    lease = await quotas.admit(Tenant("acme", limits))
    assert lease is not None
    lease.end(10)
    await eventually(lambda: not quotas._dirty and "hdel" in observer.info("commandstats").__str__())
    running.cancel()
    await asyncio.wait([running])
    await quotas.close()
    assert commands(observer) <= tried

    affinity = AffinityStore(redis_process.url, ttl=60.0)
    running = asyncio.create_task(affinity.run())
    await eventually(lambda: affinity.redis_ok)
    affinity.record("s", "h:1")
    await affinity.look_up("other")
    await eventually(lambda: observer.exists("scalellm:affinity:s") == 1)
    running.cancel()
    await asyncio.wait([running])
    assert commands(observer) - {"exists"} <= tried_for_the_scheduler
    observer.close()
