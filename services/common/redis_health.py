"""Health of a Redis: periodic tests of the commands that services need, and explanations of failures."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import re
from collections.abc import Mapping
from types import MappingProxyType

from redis import exceptions
from redis.asyncio import Redis

from scalellm.services.common.cancellation import cancellable
from scalellm.services.common.redis_client import KEY_PREFIX

_log = logging.getLogger(__name__)

REDIS_ERRORS = (exceptions.RedisError, OSError, TimeoutError)
"""The exceptions of a failed Redis operation."""

_TTL_MS = "10000"
"""Milliseconds after which test keys expire, in case they are not deleted."""
_NUM_SLOTS_TRIED = 16
"""Number of test keys, which are distributed over a cluster's nodes so that each node has some."""

# The commands of sessions and quotas, tested on a hash and an index.
_SCRIPT = """
local time = redis.call('TIME')
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'version', time[1], 'other', '')
redis.call('HGET', KEYS[1], 'version')
redis.call('HGETALL', KEYS[1])
redis.call('HINCRBY', KEYS[1], 'count', 1)
redis.call('HDEL', KEYS[1], 'other')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PERSIST', KEYS[1])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('EXISTS', KEYS[1])
redis.call('ZADD', KEYS[2], time[1], 'member')
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', 0)
redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', 0)
redis.call('ZRANGE', KEYS[2], 0, 1)
redis.call('ZREM', KEYS[2], 'none')
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return redis.call('PTTL', KEYS[2])
"""


class RedisFault(enum.Enum):
    """A kind of failure of Redis: its cause, for clients, and advice for the operator."""

    UNREACHABLE = "cannot be reached", "is it running, and the address right?"
    SLOW = "does not answer in time", "see its load, and the network"
    LOADING = "is loading its data", "it answers when that is done"
    PASSWORD = "does not accept the service's password", "correct user and password in the URL"
    PERMISSION = "does not permit what the service needs", "let the user have the command and the keys scalellm:* (ACL)"
    READ_ONLY = "takes no writes, it is a replica", "give the services the primary's address"
    NO_MEMORY = "has no memory left", "raise maxmemory, or set maxmemory-policy volatile-ttl"
    NO_DISK = "takes no writes, as it cannot keep them", "see its disk and its replicas"
    CLUSTER = (
        "is a node of a cluster that does not have all keys",
        "give the services a Redis, or a proxy, that has all",
    )
    REFUSED = "refuses a command", "Redis 6.2 or later does all that is needed"

    @property
    def cause(self) -> str:
        """The cause, as a sentence after `Redis` or `the session store`."""
        return self.value[0]

    @property
    def advice(self) -> str:
        """Advice for the operator."""
        return self.value[1]

    @property
    def answers(self) -> bool:
        """True if Redis answers but refuses, so that waiting does not help."""
        return self not in (RedisFault.UNREACHABLE, RedisFault.SLOW, RedisFault.LOADING)

    def explain(self, error: BaseException) -> str:
        """Return one line for the operator: the cause, the error of Redis or the network, and advice."""
        told = _root(error)
        return f"Redis {self.cause}: {str(told) or type(told).__name__}; {self.advice}"

    @classmethod
    def of(cls, error: BaseException) -> RedisFault:
        """Return the cause behind the error of an operation."""
        error = _root(error)
        if isinstance(error, exceptions.TimeoutError | TimeoutError):
            return cls.SLOW
        if isinstance(error, exceptions.AuthenticationError | exceptions.AuthenticationWrongNumberOfArgsError):
            return cls.PASSWORD
        code = getattr(error, "status_code", None) or str(error).partition(" ")[0]
        if isinstance(error, exceptions.ResponseError) and (within := _OF_A_SCRIPT.search(str(error))):
            code = within[1] or "NOPERM"
        if (fault := _FAULTS.get(code)) is not None:
            return fault
        return cls.REFUSED if isinstance(error, exceptions.ResponseError) else cls.UNREACHABLE


# Errors of Redis are recognised by their first word.
_FAULTS: Mapping[str, RedisFault] = MappingProxyType(
    {
        "LOADING": RedisFault.LOADING,
        "BUSY": RedisFault.SLOW,
        "NOPERM": RedisFault.PERMISSION,
        "READONLY": RedisFault.READ_ONLY,
        "MASTERDOWN": RedisFault.READ_ONLY,
        "OOM": RedisFault.NO_MEMORY,
        "MISCONF": RedisFault.NO_DISK,
        "NOREPLICAS": RedisFault.NO_DISK,
        "MOVED": RedisFault.CLUSTER,
        "ASK": RedisFault.CLUSTER,
        "TRYAGAIN": RedisFault.CLUSTER,
        "CROSSSLOT": RedisFault.CLUSTER,
        "CLUSTERDOWN": RedisFault.CLUSTER,
    }
)

# Redis 6 wraps errors of a script's commands in a sentence, which for a missing permission lacks the error code.
_OF_A_SCRIPT = re.compile(r"@user_script: ?\d+: (?:-([A-Z]+) |The user executing the script can't run)")


def _root(error: BaseException) -> BaseException:
    """Return the cause of a ConnectionError, which the client raises for any failure to connect."""
    while isinstance(error, exceptions.ConnectionError) and error.__cause__ is not None:
        error = error.__cause__
    return error


async def probe_redis(redis: Redis, *, sessions: bool) -> None:
    """Test the commands that services use, in one round trip, on keys that are deleted afterwards.

    Args:
        redis: The Redis.
        sessions: True to test also the commands of sessions and quotas; False: only those of single values.

    Raises one of REDIS_ERRORS.
    """
    tag = os.urandom(8).hex()
    single = [f"{KEY_PREFIX}probe:{tag}:{number}" for number in range(_NUM_SLOTS_TRIED)]
    # In a cluster that is reached through a proxy, the part in braces decides the node of the keys.
    fields, index = f"{KEY_PREFIX}probe:{{{tag}}}:hash", f"{KEY_PREFIX}probe:{{{tag}}}:index"
    pipeline = redis.pipeline(transaction=False)
    pipeline.ping()
    for key in single:
        pipeline.set(key, "1", px=int(_TTL_MS))
        pipeline.get(key)
        pipeline.delete(key)
    if sessions:
        pipeline.eval(_SCRIPT, 2, fields, index, _TTL_MS)
        pipeline.hgetall(fields)
        pipeline.hmget(fields, "version")
        pipeline.pttl(fields)
        pipeline.zrangebyscore(index, 0, "+inf", start=0, num=1, withscores=True)
        pipeline.zrem(index, "member")
        pipeline.delete(fields)
    for answer in await pipeline.execute(raise_on_error=False):
        if isinstance(answer, Exception):
            raise answer


class RedisWatch:
    """Tests periodically whether a Redis can do what a service needs, and logs changes.

    Args:
        redis: The Redis.
        sessions: See `probe_redis`.
        without: Consequence of a failure, for the log.
        interval: Seconds between two tests.

    Attributes:
        is_up: True if the last test succeeded.
        num_failures: Number of failed operations.
    """

    def __init__(self, redis: Redis, *, sessions: bool, without: str, interval: float = 1.0) -> None:
        self._redis = redis
        self._sessions = sessions
        self._without = without
        self._interval = interval
        self._fault: RedisFault | None = None
        self.is_up = False
        self.num_failures = 0

    async def run(self) -> None:
        """Test periodically until cancelled."""
        while True:
            try:
                with cancellable():
                    await probe_redis(self._redis, sessions=self._sessions)
            except REDIS_ERRORS as error:
                self.report(error)
            else:
                self.report(None)
            await asyncio.sleep(self._interval)

    def report(self, error: BaseException | None) -> None:
        """Record the outcome of a Redis operation: its error, or None."""
        self.num_failures += error is not None
        fault = RedisFault.of(error) if error is not None else None
        if fault is self._fault and self.is_up == (fault is None):
            return
        self._fault, self.is_up = fault, fault is None
        if fault is None or error is None:
            _log.info("Redis answers")
        else:
            level = logging.ERROR if fault.answers else logging.WARNING
            _log.log(level, "%s, %s", fault.explain(error), self._without)
