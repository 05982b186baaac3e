"""The Redis client of every service: waits are bounded, because Redis may stall and the service must not."""

from __future__ import annotations

import re

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from scalellm.services.common.lifecycle import StartError

KEY_PREFIX = "scalellm:"

# The part of an address that is shown. Any other address may contain a password anywhere.
_HOST = r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_SHAPES = tuple(
    re.compile(rf"(?P<scheme>{scheme})://(?P<who>[^/?#]*@)?(?P<place>{place})(?P<query>\?[^@#]*)?")
    for scheme, place in (("rediss?", rf"{_HOST}(?:/[0-9]*)?"), ("unix", r"/[^@?#]*"))
)


def open_redis(url: str, *, timeout: float = 1.0) -> Redis:
    """A client whose every operation answers or raises redis.RedisError within about `timeout` seconds.

    Connects on first use and reconnects by itself. One retry covers a connection that the server closed while idle.

    Args:
        url: redis://host:port/db, rediss://... or unix://path.
        timeout: Longest wait for a connection and for an answer, in seconds.

    Raises StartError when the URL is none.
    """
    try:
        _refuse_raw_secrets(url)
        return Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 1),
            # Off: against a stalled server its health check reconnects, which checks the health again, without end.
            health_check_interval=0,
            decode_responses=False,
        )
    except ValueError:  # its message may quote a part of the password
        raise StartError(
            "--redis-url: must be redis://user:password@host:port/db, rediss://... or unix:///path; characters such as "
            "@ / : ? # in a password are percent-encoded"
        ) from None


def shown_url(url: str) -> str:
    """The URL as it may be shown: without user, password and query, whatever characters a raw password has."""
    for shape in _SHAPES:
        if found := shape.fullmatch(url):
            who, query = "***@" if found["who"] else "", "?***" if found["query"] else ""
            return f"{found['scheme']}://{who}{found['place']}{query}"
    return "REDIS_URL"


def _refuse_raw_secrets(url: str) -> None:
    """Raise ValueError where a raw / ? or # ended the part with the password: its rest would be taken for a host."""
    before_query, _, query = url.partition("?")
    authority, slash, path = before_query.partition("://")[2].partition("/")
    if "#" in url or "@" in path or ("@" in query and not re.match("(.*&)?(username|password)=", query)):
        raise ValueError("characters that end the part with the password")
    if before_query.startswith("unix:") and authority and not (authority.endswith("@") and slash):
        raise ValueError("a socket's path begins with /")
