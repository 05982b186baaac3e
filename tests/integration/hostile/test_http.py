"""Abuses of HTTP/1.1 and odd bodies: a neighbour is answered meanwhile, and everything is back afterwards.

A body that fails is named with its number, from which it follows: `HOSTILE_SEED=7 HOSTILE_ONLY=1234` sends it alone.
"""

from __future__ import annotations

import json
import random

import aiohttp
import pytest

from hostile_send import attack, describe
from http_abuses import ABUSES
from line import Line
from service_processes import PATIENCE
from structured_json import ENDPOINTS, structured_body
from vital_signs import assert_silent, neighbour, rest

REFUSALS = {400, 404, 413, 429, 501}
ENDED = {499, 504}
"""Statuses of a request that its own deadline ended."""


@pytest.mark.parametrize("name", ABUSES)
async def test_abuse(line: Line, table: list[str], name: str) -> None:
    address = line.tokenizer.http_address
    assert address is not None
    async with neighbour(line, by_http=True) as other:
        # Once for the pools and arenas that a first time makes grow; what is kept of the second was lost.
        await ABUSES[name](address)
        before = await rest(line)
        counts = await ABUSES[name](address)
    after = await rest(line, before)
    assert_silent(line)
    assert other.num_answers > 0
    assert "500" not in counts, f"a mistake of ours: {dict(counts)}"
    memory = f"{before.rss['tokenizer'] >> 20} -> {after.rss['tokenizer'] >> 20} MiB"
    table.append(f"{name:25} http      neighbour {other.num_answers:4}  {memory:18} {dict(counts)}")


async def test_bodies(line: Line, table: list[str], seconds: float, run_seed: int) -> None:
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(f"http://{line.tokenizer.http_address}", timeout=timeout) as session:

        async def send(number: int) -> str:
            rng = random.Random(f"http {run_seed} {number}")
            path = rng.choice(list(ENDPOINTS))
            # A long answer is ended by its deadline; everything else ends by itself.
            headers = {"content-type": "application/json", "request-timeout-ms": str(rng.choice((50, 500, 2000)))}
            async with session.post(path, data=structured_body(path, rng), headers=headers) as response:
                status, body = response.status, await response.read()
            check(path, status, body)
            return str(status)

        await attack(line, table, describe(run_seed, "HTTP bodies"), seconds / 2, send, by_http=True)


def check(path: str, status: int, body: bytes) -> None:
    """Raise AssertionError for an answer that no client could take for one."""
    shown = f"{path}: {status} {body[:500]!r}"
    if status == 200:
        if body.startswith((b"data: ", b"event: ", b": ")):
            assert body.endswith(b"\n\n"), shown
            for line in body.decode().split("\n"):
                if line.startswith("data: ") and line != "data: [DONE]":
                    json.loads(line.removeprefix("data: "))
        else:
            json.loads(body)
        return
    assert status in REFUSALS | ENDED, shown
    error = json.loads(body)["error"]
    assert error["message"], shown
    assert len(error["message"]) < 2000, shown
    if status == 400 and "param" in error:
        assert error["param"] is not None, shown
        assert error["message"].startswith(error["param"]), shown
