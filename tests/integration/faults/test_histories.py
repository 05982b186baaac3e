"""Random histories of faults in virtual time, with the real objects of all services: `play(seed)` repeats one."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter

import pytest

from bench.virtual.network import Connection
from virtual_histories import play

NUM_HISTORIES = 90
"""Played by `make test`; `make test-faults` plays thousands."""


@pytest.fixture(autouse=True)
def _no_logs() -> None:
    """Every history is full of what services warn of."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def play_all(name: str, count: int) -> Counter[str]:
    counts = Counter[str]()
    for number in range(count):
        history = play(f"{name}-{number}")
        assert not history.problems, history.describe()
        counts += history.counts()
    return counts


def test_histories() -> None:
    counts = play_all("suite", NUM_HISTORIES)
    assert counts["OK"] > 5 * counts["UNAVAILABLE"]
    assert counts["resumed"] > 0
    assert counts["recalled"] > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_more_histories(table: list[str], seed: int) -> None:
    count = int(os.environ.get("FAULTS_HISTORIES") or 300)
    started = time.monotonic()
    counts = play_all(f"{seed}", count)
    table.append(f"{count} histories in virtual time ({time.monotonic() - started:.0f} s): {dict(counts)}")


def test_a_lost_frame_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of this check: a network that loses one frame in fifty is told of."""
    take = Connection.read
    reads = Counter[str]()

    async def read(self: Connection) -> object:
        reads["all"] += 1
        message = await take(self)
        return await take(self) if reads["all"] % 50 == 0 else message

    monkeypatch.setattr(Connection, "read", read)
    assert any(play(f"lossy-{number}").problems for number in range(5))


def test_a_history_follows_from_its_seed() -> None:
    first, second = play("twice"), play("twice")
    assert first.events == second.events
    assert [stream.tokens for stream in first.streams] == [stream.tokens for stream in second.streams]
