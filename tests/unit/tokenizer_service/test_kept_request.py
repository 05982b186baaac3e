"""A kept request that a worker loses and takes back: its journal has every token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn
from unittest.mock import MagicMock

import grpc
import pytest
from redis import Redis

from scalellm.services.common.api_keys import Tenant, TenantLimits
from scalellm.services.common.errors import StatusError
from scalellm.services.common.redis_client import open_redis
from scalellm.services.tokenizer.kept import run
from scalellm.services.tokenizer.kept.journal import Entry, Head, Journal, Written
from scalellm.services.tokenizer.kept.kept_request import KeptRequest
from scalellm.services.tokenizer.kept.transcript import Transcript
from scalellm.services.tokenizer.quotas import TenantQuotas
from scalellm.services.tokenizer.token_receiver import TokenBatch
from scalellm.v1 import common_pb2, generation_pb2, link_pb2
from service_processes import PATIENCE, RedisProcess

TENANT = Tenant("acme", TenantLimits(tokens_per_minute=1000))
HEAD = "scalellm:request:{acme}:r"


class FakeSchedulers:
    """Ends each attempt with the next of some actions."""

    def __init__(self, *attempts: Callable[[], NoReturn]) -> None:
        self._attempts = iter(attempts)

    def submit(self, submit: link_pb2.Submit) -> NoReturn:
        next(self._attempts)()


async def test_a_worker_that_takes_its_request_back_leaves_no_gap(
    redis_process: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, store = open_redis(redis_process.url, timeout=PATIENCE), Redis.from_url(redis_process.url)
    sampling = common_pb2.SamplingParams(n=1, seed=1, max_tokens=100)
    submit = link_pb2.Submit(request_id="r", token_ids=[1, 2], sampling=sampling, execution_id=b"e")
    request = generation_pb2.GenerateRequest(prompt="x", request_id="r", sampling=sampling)
    head = Head(b"digest", request, submit, generation_pb2.Started(request_id="r"))
    dead = Journal(client, "dead", ttl=100.0, lease=0.1, max_bytes=2**20)
    await dead.create(TENANT, head, 1, None)
    first = Transcript(submit)
    first.add(TokenBatch(0, list(range(10))))
    step, _ = first.since(first.begin())
    ((written, _),) = await dead.write([Entry(TENANT, "r", b"e", 1, 1, 0, step.SerializeToString(), gives_up=True)])
    assert written is Written.DONE

    journal = Journal(client, "worker", ttl=100.0, lease=100.0, max_bytes=2**20)
    kept: KeptRequest

    def lose_it() -> NoReturn:
        kept.transcript.add(TokenBatch(0, list(range(10, 17))))  # which are not written yet
        store.hset(HEAD, "lease", 0)
        raise StatusError(grpc.StatusCode.ABORTED, "another worker runs it")

    def shut_down() -> NoReturn:
        kept.transcript.add(TokenBatch(0, [17, 18]))
        raise StatusError.unavailable("the service is shutting down")

    quotas = TenantQuotas(None, "worker")
    edge = MagicMock(schedulers=FakeSchedulers(lose_it, shut_down), quotas=quotas)
    monkeypatch.setattr(run, "make_samples", lambda *_: [MagicMock()])
    kept = KeptRequest(edge, journal, asyncio.Lock(), TENANT, head)
    ended = asyncio.Event()
    with kept.followed():
        kept.start(lambda kept: ended.set())
        await asyncio.wait_for(ended.wait(), PATIENCE)
    assert edge.metrics.taken_over.inc.call_count == 2
    # Two tokens of the prompt and ten of the answer were charged to the dead worker, the other nine here.
    (account,) = quotas._accounts.values()
    assert account.unreported_tokens == 9

    reading = await dead.read(TENANT, "r")
    assert reading is not None
    found = Transcript(submit)
    found.apply(reading.steps)
    assert found.samples[0].token_ids.tolist() == list(range(19))
    await client.aclose()
    store.close()
