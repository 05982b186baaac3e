"""Fixtures that start real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service_processes import RedisProcess, Spawn, spawner, start_redis


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Start services that end with the test."""
    yield from spawner(tmp_path)


@pytest.fixture(scope="module")
def module_spawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawn]:
    """Start services that end with the module."""
    yield from spawner(tmp_path_factory.mktemp("services"))


@pytest.fixture(scope="session")
def session_spawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawn]:
    """Start services that end with this process of the tests."""
    yield from spawner(tmp_path_factory.mktemp("services"))


def _redis(folder: Path) -> Iterator[RedisProcess]:
    redis = start_redis(folder)
    yield redis
    redis.stop()
    Path(redis.url.removeprefix("unix://")).unlink(missing_ok=True)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that ends with the test."""
    yield from _redis(tmp_path)


@pytest.fixture(scope="module")
def module_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A Redis that ends with the module."""
    yield from _redis(tmp_path_factory.mktemp("redis"))


@pytest.fixture(scope="session")
def session_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A Redis that ends with this process of the tests."""
    yield from _redis(tmp_path_factory.mktemp("redis"))
