"""How every service reaches Redis: bounded waits, because Redis may stall and the service must not."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.common.lifecycle import StartError

KEY_PREFIX = "scalellm:"


def open_redis(url: str, *, timeout: float = 1.0) -> Redis:
    """A client whose every operation answers or raises redis.RedisError within about `timeout` seconds.

    Connects on first use and reconnects by itself. One retry covers a connection that the server closed while idle.

    Args:
        url: redis://host:port/db, rediss://... or unix://path.
        timeout: Longest wait for a connection and for an answer, in seconds.

    Raises StartError when the URL is none.
    """
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 1),
            # Off: against a stalled server its health check reconnects, which checks the health again, without end.
            health_check_interval=0,
            decode_responses=False,
        )
    except ValueError as error:
        raise StartError(f"--redis-url: {error}") from None
