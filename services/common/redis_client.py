"""The Redis client of every service. Its waits are limited, so that a stalled Redis does not stall the service."""

from __future__ import annotations

import re
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from scalellm.services.common.addresses import split_address
from scalellm.services.common.lifecycle import StartError

KEY_PREFIX = "scalellm:"

_SENTINEL = re.compile(r"rediss?\+sentinel://")
_SENTINEL_PORT = 26379

# The part of a URL that may be shown. In any other URL a password may be anywhere.
_HOST = r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_SHAPES = tuple(
    re.compile(rf"(?P<scheme>{scheme})://(?P<who>[^/?#]*@)?(?P<place>{place})(?P<query>\?[^@#]*)?")
    for scheme, place in (
        ("rediss?", rf"{_HOST}(?:/[0-9]*)?"),
        (r"rediss?\+sentinel", rf"{_HOST}(?:,{_HOST})*/[A-Za-z0-9._-]+(?:/[0-9]*)?"),
        ("unix", r"/[^@?#]*"),
    )
)


def open_redis(url: str, *, timeout: float = 1.0) -> Redis:
    """Make a client, each operation of which returns or raises redis.RedisError within about `timeout` seconds.

    Connects on first use and reconnects by itself. One retry covers a connection that the server closed while idle.

    Args:
        url: redis://host:port/db, rediss://..., unix://path or redis+sentinel://host:port,host:port/name/db.
        timeout: Longest wait for a connection and for an answer, in seconds.

    Raises StartError if the URL is invalid.
    """
    try:
        _refuse_raw_secrets(url)
        if _SENTINEL.match(url):
            return _open_by_sentinel(url, timeout)
        return Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 1),
            # Health checks are off, because against a stalled server each reconnects and checks again, without end.
            health_check_interval=0,
            decode_responses=False,
        )
    except ValueError:  # its message may quote a part of the password
        raise StartError(
            "--redis-url: must be redis://user:password@host:port/db, rediss://..., unix:///path or "
            "redis+sentinel://user:password@host:port,host:port/name; characters such as @ / : ? # in a password are "
            "percent-encoded"
        ) from None


class _Pool(SentinelConnectionPool):
    """A pool of connections to the master that the sentinels name. Closing it also closes the connections to
    sentinels.
    """

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:  # False if the pool itself disconnects because the master has changed
            await self.sentinel_manager.aclose()


def _open_by_sentinel(url: str, timeout: float) -> Redis:
    """Make a client of the master that Sentinel names. Each new connection asks Sentinel, so failovers are followed.

    TLS, user and password are those of Redis; TLS is used for the sentinels, too, which have a user and a password of
    their own in the query: `sentinel_username`, `sentinel_password`. Raises ValueError.
    """
    scheme, _, rest = url.partition("://")
    before_query, question_mark, query = rest.partition("?")
    authority, _, path = before_query.partition("/")
    who, at, hosts = authority.rpartition("@")
    name, slash, database = path.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or (slash and not database.isdecimal()):
        raise ValueError("must end with /MASTER or /MASTER/DATABASE, the database as a number")
    addresses = [split_address(host if _has_port(host) else f"{host}:{_SENTINEL_PORT}") for host in hosts.split(",")]
    # The client's own rules for user, password and query; the host does not matter.
    found = parse_url(f"{scheme.removesuffix('+sentinel')}://{who}{at}host/{database}{question_mark}{query}")
    is_tls = found.pop("connection_class", None) is not None
    options: dict[str, Any] = {key: value for key, value in found.items() if key not in ("host", "port")}
    own = {key: options.pop(f"sentinel_{key}", None) for key in ("username", "password")}
    tls = {key: value for key, value in options.items() if key.startswith("ssl_")}
    # One after the other is asked: together they take no longer than a single one may.
    one = timeout / len(addresses)
    waits = {"socket_timeout": one, "socket_connect_timeout": one, "retry": Retry(NoBackoff(), 0)}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        addresses, sentinel_kwargs={**waits, **own, **tls, "ssl": is_tls}
    )
    master: Redis = sentinel.master_for(
        name,
        connection_pool_class=_Pool,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 1),
        health_check_interval=0,
        decode_responses=False,
        ssl=is_tls,
        **options,
    )
    return master


def _has_port(host: str) -> bool:
    return re.search(r"[^:]:[0-9]+$|\]:[0-9]+$", host) is not None


def shown_url(url: str) -> str:
    """Return the URL for display, without user, password and query, even if the password has unescaped characters."""
    for shape in _SHAPES:
        if found := shape.fullmatch(url):
            who, query = "***@" if found["who"] else "", "?***" if found["query"] else ""
            return f"{found['scheme']}://{who}{found['place']}{query}"
    return "REDIS_URL"


def _refuse_raw_secrets(url: str) -> None:
    """Raise ValueError if a password contains an unescaped / ? or #, because the part after it would be taken for a
    host.
    """
    before_query, _, query = url.partition("?")
    authority, slash, path = before_query.partition("://")[2].partition("/")
    if "#" in url or "@" in path or ("@" in query and not re.match("(.*&)?(sentinel_)?(username|password)=", query)):
        raise ValueError("characters that end the part with the password")
    if before_query.startswith("unix:") and authority and not (authority.endswith("@") and slash):
        raise ValueError("a socket's path begins with /")
