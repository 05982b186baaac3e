"""Limits of tenants: over several workers in a real Redis, and alone when Redis is away."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
import pytest_asyncio

from scalellm.services.common.api_keys import DEFAULT_TENANT, Tenant, TenantLimits
from scalellm.services.common.errors import StatusError
from scalellm.services.common.redis_client import open_redis
from scalellm.services.tokenizer.quotas import TenantQuotas
from service_processes import PATIENCE, eventually


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@asynccontextmanager
async def running(*workers):
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    yield workers
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for worker in workers:
        await worker.close()


@pytest_asyncio.fixture
async def workers(redis_process):
    """Two worker processes, as far as Redis can tell; patient ones."""
    both = (TenantQuotas(open_redis(redis_process.url, timeout=PATIENCE), f"worker-{n}") for n in range(2))
    async with running(*both) as workers:
        yield workers


async def refusal(worker, tenant):
    with pytest.raises(StatusError) as error:
        await worker.admit(tenant)
    assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.value.retry_after > 0
    return error.value


async def test_no_limits_cost_nothing():
    assert await TenantQuotas(None, "w").admit(Tenant("acme")) is None


async def test_a_tenant_cannot_go_before_others_where_it_may_not():
    refused = []
    worker = TenantQuotas(None, "w", refused=refused.append)
    tenant = Tenant("acme", TenantLimits(min_priority=-1))
    assert await worker.admit(tenant) is None
    assert await worker.admit(tenant, -1) is None
    with pytest.raises(StatusError) as error:
        await worker.admit(tenant, -2)
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.message == "priority: must be at least -1 for tenant 'acme', got -2"
    with pytest.raises(StatusError, match="priority: must be at least 0 for tenant 'other', got -1"):
        await worker.admit(Tenant("other"), -1)  # nothing was granted
    assert await worker.admit(DEFAULT_TENANT, -100) is None, "without keys there is nobody to go before"
    assert refused == ["min_priority"] * 2


async def test_requests_at_once_are_counted_over_workers(workers, redis_process):
    one, two = workers
    tenant, other = (Tenant(name, TenantLimits(concurrent_requests=3)) for name in ("acme", "other"))
    leases = [await one.admit(tenant), await one.admit(tenant), await two.admit(tenant)]
    error = await refusal(two, tenant)
    assert error.message.startswith("concurrent_requests: tenant 'acme' may use 3 at once; retry in")
    await refusal(one, tenant)
    assert await one.admit(other) is not None
    leases[0].end(0)
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                leases[0] = await two.admit(tenant)
                break
            except StatusError:
                await asyncio.sleep(0.01)
    for lease in leases:
        lease.end(0)
    redis = open_redis(redis_process.url, timeout=PATIENCE)
    async with asyncio.timeout(PATIENCE):
        while await redis.hkeys("scalellm:quota:{acme}") != [b"requests", b"tokens"]:
            await asyncio.sleep(0.01)
    assert await redis.ttl("scalellm:quota:{acme}") == -1, "a full Redis evicts only what expires"
    await redis.aclose()


async def test_calls_that_read_kept_answers_are_counted_apart_and_over_workers(workers):
    one, two = workers
    tenant = Tenant("acme", TenantLimits(concurrent_requests=1, requests_per_minute=1))
    lease = await one.admit(tenant)
    async with one.reading(tenant):
        with pytest.raises(StatusError, match="concurrent_requests: tenant 'acme' may use 1 at once") as error:
            async with two.reading(tenant):
                pass
        assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await eventually(lambda: not one._dirty)
    async with two.reading(tenant), two.reading(Tenant("other")), two.reading(Tenant("other")):
        assert two._accounts["scalellm:quota:{acme}:readers"].running == 1
    lease.end(0)
    assert {account.running for worker in workers for account in worker._accounts.values()} == {0}


async def test_what_a_dead_worker_ran_is_forgotten_and_what_a_live_one_runs_is_not(redis_process):
    tenant = Tenant("acme", TenantLimits(concurrent_requests=1))
    redis = open_redis(redis_process.url, timeout=PATIENCE)
    dead, alive = TenantQuotas(redis, "dead", lease=0.3), TenantQuotas(redis, "alive", lease=3.0)
    now = asyncio.get_running_loop().time
    async with running(alive), asyncio.timeout(PATIENCE):
        began = now()
        await dead.admit(tenant)
        while True:
            try:
                await alive.admit(tenant)
                break
            except StatusError:
                await asyncio.sleep(0.01)
        assert now() - began > 0.29
        first = expiry = await lease_expiry(redis, "alive")
        while expiry == first:  # it is renewed, in time
            await asyncio.sleep(0.01)
            expiry = await lease_expiry(redis, "alive")
        await refusal(dead, tenant)


async def lease_expiry(redis, worker):
    return int((await redis.hget("scalellm:quota:{acme}", f"running:{worker}")).split()[1])


async def test_requests_per_minute(workers):
    one, two = workers
    tenant = Tenant("acme", TenantLimits(requests_per_minute=2))
    for worker in workers:
        (await worker.admit(tenant)).end(0)
    error = await refusal(one, tenant)
    assert error.message.startswith("requests_per_minute: tenant 'acme' may use 2 per minute")
    assert 10 < error.retry_after <= 30
    assert 10 < (await refusal(two, tenant)).retry_after <= 30


async def test_tokens_are_counted_when_they_are_known(workers):
    one, two = workers
    tenant = Tenant("acme", TenantLimits(tokens_per_minute=600))
    lease = await one.admit(tenant)
    lease.end(6600)
    await eventually(lambda: one._accounts["scalellm:quota:{acme}"].unreported_tokens == 0)
    error = await refusal(two, tenant)
    assert error.message.startswith("tokens_per_minute: tenant 'acme' may use 600 per minute")
    assert 500 < error.retry_after <= 600


@pytest.mark.parametrize("shared", [True, False])
async def test_tokens_are_reserved_before_they_are_used(workers, shared):
    """A hundred requests that each may use a minute's worth do not start within one minute."""
    one, two = workers if shared else 2 * (TenantQuotas(None, "alone", clock=Clock()),)
    tenant = Tenant("acme", TenantLimits(tokens_per_minute=6000))
    leases = [await one.admit(tenant) for _ in range(100)]
    results = await asyncio.gather(*(lease.reserve(100 + 16 * 4000) for lease in leases), return_exceptions=True)
    started = [lease for lease, result in zip(leases, results, strict=True) if result is None]
    assert 1 <= len(started) <= 2  # the bucket leaks a little while they come
    refused = {error.message.partition(";")[0] for error in results if error is not None}
    assert refused == {"tokens_per_minute: tenant 'acme' may use 6000 per minute, over all its requests"}
    await refusal(two, tenant)
    for lease in leases:  # what is not used is given back
        lease.end(10 if lease in started else 0)
    await eventually(lambda: one._accounts["scalellm:quota:{acme}"].unreported_tokens == 0 or not shared)
    again = [await two.admit(tenant) for _ in range(5)]
    for lease in again:
        await lease.reserve(1000)
    for lease in again:
        lease.end(7000)
    await eventually(lambda: two._accounts["scalellm:quota:{acme}"].unreported_tokens == 0 or not shared)
    assert 250 < (await refusal(two, tenant)).retry_after < 292, "what is used beyond the reservation is waited off"


async def test_without_redis_each_process_keeps_to_the_limits():
    clock = Clock()
    refused = []
    worker = TenantQuotas(None, "w", clock=clock, refused=refused.append)
    assert (worker.is_shared, worker.is_degraded) == (False, False)
    requests = Tenant("a", TenantLimits(requests_per_minute=2))
    for _ in range(2):
        (await worker.admit(requests)).end(0)
    assert (await refusal(worker, requests)).retry_after == pytest.approx(30)
    clock.now += 30
    (await worker.admit(requests)).end(0)
    tokens = Tenant("b", TenantLimits(tokens_per_minute=60))
    (await worker.admit(tokens)).end(90)
    clock.now += 29
    assert (await refusal(worker, tokens)).retry_after == pytest.approx(1)
    clock.now += 2
    lease = await worker.admit(tokens)
    concurrent = Tenant("b", TenantLimits(concurrent_requests=1))  # the file was changed
    await refusal(worker, concurrent)
    lease.end(0)
    await worker.admit(concurrent)
    assert refused == ["requests_per_minute", "tokens_per_minute", "concurrent_requests"]


async def test_a_stalled_redis_is_waited_for_once_and_nothing_is_forgotten(workers, redis_process, monkeypatch):
    _, patient = workers
    tenant = Tenant("acme", TenantLimits(concurrent_requests=2, tokens_per_minute=600))
    clock = Clock()
    redis = open_redis(redis_process.url, timeout=2.0)
    async with running(TenantQuotas(redis, "hasty", clock=clock)) as (hasty,):
        lease = await hasty.admit(tenant)
        redis_process.pause()
        try:
            second = await hasty.admit(tenant)
            assert (hasty.is_degraded, hasty.num_failures) == (True, 1)
            with monkeypatch.context() as nobody_asks:
                nobody_asks.setattr(redis, "eval", None, raising=False)
                await refusal(hasty, tenant)
            lease.end(6600)
            second.end(0)
        finally:
            redis_process.resume()
        async with asyncio.timeout(PATIENCE):
            while not hasty.is_shared or hasty._accounts["scalellm:quota:{acme}"].unreported_tokens:
                clock.now += 1  # it tries again every second
                await asyncio.sleep(0.1)
        assert not hasty.is_degraded
        assert 400 < (await refusal(patient, tenant)).retry_after <= 600


class Ledger:
    """A Redis that adds up the tokens that it charges, and does not answer while it is told so."""

    def __init__(self):
        self.charged, self.asked = 0, asyncio.Event()
        self.answers, self.charges = True, True

    async def eval(self, *what):
        *_, tokens, _, _, _, reserve = what
        if self.charges:
            self.charged += int(tokens) + int(reserve)
        self.asked.set()
        if not self.answers:
            await asyncio.Event().wait()
        return b"", 0

    async def aclose(self):
        pass


async def cancelled_reservation(ledger, lease, tokens):
    """Let a call leave while Redis is asked to reserve its tokens."""
    ledger.asked.clear()
    ledger.answers = False
    reserving = asyncio.create_task(lease.reserve(tokens))
    await asyncio.wait_for(ledger.asked.wait(), PATIENCE)
    ledger.answers = ledger.charges = True  # what is asked from now on
    reserving.cancel()
    await asyncio.gather(reserving, return_exceptions=True)


async def test_what_a_call_reserved_that_left_meanwhile_is_given_back():
    ledger = Ledger()
    tenant = Tenant("acme", TenantLimits(tokens_per_minute=600))
    async with running(TenantQuotas(ledger, "w", clock=Clock())) as (worker,):
        lease = await worker.admit(tenant)
        await cancelled_reservation(ledger, lease, 1000)
        assert ledger.charged == 600
        lease.end(7)  # of its prompt
        await eventually(lambda: ledger.charged == 7)
        account = worker._accounts["scalellm:quota:{acme}"]
        assert account.tokens_until == pytest.approx(worker.clock() + 0.7), "nor is more charged here"


async def test_a_refused_reservation_gives_nothing_back():
    tenant = Tenant("acme", TenantLimits(tokens_per_minute=600))
    async with running(TenantQuotas(None, "w", clock=Clock())) as (worker,):
        first, second = await worker.admit(tenant), await worker.admit(tenant)
        await first.reserve(600)
        with pytest.raises(StatusError):
            await second.reserve(600)
        second.end(0)
        await refusal(worker, tenant)


async def test_what_could_not_be_reported_as_the_call_left_is_reported_later():
    ledger = Ledger()
    tenant = Tenant("acme", TenantLimits(tokens_per_minute=600))
    async with running(TenantQuotas(ledger, "w", clock=Clock())) as (worker,):
        lease = await worker.admit(tenant)
        worker._accounts["scalellm:quota:{acme}"].unreported_tokens = 50  # of another call
        ledger.charges = False
        await cancelled_reservation(ledger, lease, 600)
        await eventually(lambda: ledger.charged == 50)
