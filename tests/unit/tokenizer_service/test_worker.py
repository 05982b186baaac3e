"""A worker process that drains."""

from __future__ import annotations

import asyncio
from unittest.mock import AsyncMock, MagicMock

from scalellm.services.tokenizer.worker import Worker
from service_processes import PATIENCE


async def test_calls_end_before_redis_has_heard_of_the_kept_requests() -> None:
    worker = Worker(MagicMock(drain_limit_s=0.0, served_models=[]), 0, None, None)
    worker._gate.enter()
    silence, ended = asyncio.Event(), asyncio.Event()
    kept, edge = MagicMock(), MagicMock()
    kept.stop = silence.wait
    edge.schedulers.end_all = lambda why: ended.set()
    draining = asyncio.create_task(worker._drain(MagicMock(health=AsyncMock()), [edge], kept))  # type: ignore[arg-type]
    await asyncio.wait_for(ended.wait(), PATIENCE)
    assert not draining.done()
    silence.set()
    await draining
