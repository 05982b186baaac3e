"""The shown form of a Redis URL has no part of a password, whatever characters that has and wherever it stands."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis.asyncio.connection import SSLConnection

from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.redis_client import open_redis, shown_url

# No letter of a password is one of what surrounds it, so that any of its letters in the output is a leak.
RAW = st.text(alphabet="QXZ" + "@/#:?&=%[]. " + "\n", min_size=1, max_size=12).map(lambda text: f"Q{text}Q")
SHAPES = (
    "redis://:{}@host:6379/0",
    "redis://user:{}@host:6379/1",
    "rediss://user:{}@[::1]:6379",
    "redis://{}@host",
    "redis://:{}@host/0?health_check_interval=1",
    "redis://host:6379/0?password={}",
    "redis://host:6379/0?db=1&password={}&username=user",
    "redis+sentinel://user:{}@a:26379,b/main/0",
    "rediss+sentinel://a,b/main?sentinel_password={}",
    "unix://:{}@/run/redis.sock?db=1",
    "unix://user:{}@/run/redis.sock",
    "unix:///run/redis.sock?password={}",
    "REDIS://:{}@host",
    "redis:{}@host",
    "{}",
)


@given(st.sampled_from(SHAPES), RAW)
@example("redis://:{}@host:6379/0", "Q12/34Q")
@example("redis://user:{}@host:6379/1", "Q?password=XQ")
def test_no_part_of_a_password_is_shown_or_said(shape: str, password: str) -> None:
    url = shape.format(password)
    shown = shown_url(url)
    assert not set(shown) & set("QXZ") or shown == "REDIS_URL"
    said = ""
    try:
        open_redis(url)
    except StartError as error:
        said = str(error)
    assert not set(said) & set("QXZ")


@given(st.text(alphabet=string.digits, min_size=3, max_size=5), st.sampled_from("/?#"))
def test_a_raw_password_is_never_taken_for_a_port(digits: str, raw: str) -> None:
    url = f"redis://:{digits}{raw}x@host:6379/0"
    assert shown_url(url) == "REDIS_URL"
    with pytest.raises(StartError, match="percent-encoded"):
        open_redis(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://[::1]:6379", "redis://[::1]:6379"),
        ("redis://user:a@b:c@host:6379/1", "redis://***@host:6379/1"),
        ("redis://:%40%2F@host", "redis://***@host"),
        ("redis://token@host", "redis://***@host"),
        ("rediss://redis:6379/0?ssl_ca_certs=/ca.pem", "rediss://redis:6379/0?***"),
        ("redis+sentinel://:s@a:26379,b:1/main/0", "redis+sentinel://***@a:26379,b:1/main/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("unix://user:secret@/run/redis.sock?db=1", "unix://***@/run/redis.sock?***"),
        ("redis://:secret@[host", "REDIS_URL"),
        ("redis://:secret/x@host", "REDIS_URL"),
        ("http://user:secret@host", "REDIS_URL"),
        ("", "REDIS_URL"),
    ],
)
def test_what_is_shown(url: str, shown: str) -> None:
    assert shown_url(url) == shown


async def test_ipv6_and_encoded_passwords_reach_redis_as_they_are() -> None:
    client = open_redis("redis://user:%40%2F%23@[::1]:7/2")
    arguments = client.connection_pool.connection_kwargs
    assert [arguments[name] for name in ("host", "port", "db", "username", "password")] == ["::1", 7, 2, "user", "@/#"]
    await client.aclose()


async def test_sentinels_and_their_master_have_passwords_of_their_own() -> None:
    client = open_redis("rediss+sentinel://user:%40@a:1,[::1]/main/2?sentinel_password=s&ssl_ca_certs=/ca.pem")
    pool: Any = client.connection_pool
    assert pool.service_name == "main"
    master = pool.connection_kwargs
    assert [master[name] for name in ("db", "username", "password", "ssl_ca_certs")] == [2, "user", "@", "/ca.pem"]
    assert "sentinel_password" not in master
    found: list[Any] = [one.connection_pool for one in pool.sentinel_manager.sentinels]
    addresses = [(one.connection_kwargs["host"], one.connection_kwargs["port"]) for one in found]
    assert addresses == [("a", 1), ("::1", 26379)]
    for one in found:
        assert issubclass(one.connection_class, SSLConnection)
        assert (one.connection_kwargs["password"], one.connection_kwargs["ssl_ca_certs"]) == ("s", "/ca.pem")
    assert issubclass(pool.connection_class, SSLConnection)


@pytest.mark.parametrize("url", ["redis+sentinel://a:1", "redis+sentinel://a:1/", "redis+sentinel://a:1/main/x"])
def test_a_sentinel_url_names_its_master(url: str) -> None:
    with pytest.raises(StartError, match="sentinel"):
        open_redis(url)
