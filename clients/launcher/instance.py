"""The stored state of an instance: `<home>/run/<name>/`, gone once the instance is down.

The folder holds the state file, the services' logs and announced addresses, and the embedded Redis's socket and data.
It is also the lock: one `up` or `down` at a time holds an flock on it, which the kernel releases whatever happens to
its holder. The state file has one writer, the supervisor.

What is in there names processes to end and a Redis with its password, so `run` and all below it is this user's alone:
links are not followed, and what belongs to somebody else is refused. `<home>` itself may be a link.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scalellm.launcher.errors import LauncherError
from scalellm.services.common.new_file import write_new

REDIS, EXECUTOR, SCHEDULER, TOKENIZER = "redis", "executor", "scheduler", "tokenizer"
SUPERVISOR = "supervisor"
_KINDS = (REDIS, EXECUTOR, SCHEDULER, TOKENIZER)

# Another launcher removes the folder once; a file system on which it cannot be made (/proc) says "not found" for ever.
_ATTEMPTS = 100

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """One process that was started, the leader of a session of its own.

    `create_time` (seconds since the epoch, from psutil) tells the process from a later one with the same pid.
    `address` is host:port, or a socket's path for Redis; empty until the service has announced it.

    `restarts` counts how often the supervisor has started it again; `ended_at` (seconds since the epoch) and `reason`
    are when and how it ended the last time. `given_up` says why it is not started again; empty while it is.
    """

    name: str
    kind: str
    pid: int
    create_time: float
    log: str
    address: str = ""
    metrics_address: str = ""
    http_address: str = ""
    restarts: int = 0
    ended_at: float = 0.0
    reason: str = ""
    given_up: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """An instance as last written.

    `model` has the names of the models, with commas in between. `redis_url` is what the services were given, the
    embedded one's or the user's. `asked` is what `up` was asked for, but for environment variables. `supervisor` is
    the process that keeps the services running, unless it was told to leave them alone; `in_foreground`: it is a
    `scalellm up --foreground`, which ends with them.
    """

    model: str
    redis_url: str
    drain_limit: float
    services: tuple[ServiceRecord, ...] = ()
    scratch: str = ""
    asked: Mapping[str, Any] = field(default_factory=dict)
    supervisor: ServiceRecord | None = None
    in_foreground: bool = False

    def with_service(self, record: ServiceRecord) -> State:
        """The same with `record` added, or in place of the one with its name."""
        services = {service.name: service for service in self.services} | {record.name: record}
        # Services that others depend on come first, whichever was started first.
        return replace(self, services=tuple(sorted(services.values(), key=lambda service: _KINDS.index(service.kind))))

    def of_kind(self, kind: str) -> tuple[ServiceRecord, ...]:
        """The services of one kind, in the order in which they were started."""
        return tuple(service for service in self.services if service.kind == kind)

    def service(self, name: str) -> ServiceRecord:
        """The service of this name."""
        return next(service for service in self.services if service.name == name)

    @property
    def http_address(self) -> str:
        """host:port to call by HTTP from this machine; empty before the tokenizer is up."""
        return next((service.http_address for service in self.of_kind(TOKENIZER)), "")

    @property
    def public_address(self) -> str:
        """host:port to call from this machine; empty before the tokenizer is up."""
        for service in self.of_kind(TOKENIZER):
            return service.address
        return ""


class Instance:
    """The folder of one instance.

    Args:
        home: The user's ScaleLLM folder.
        name: Letters, digits, dots, dashes and underscores.
    """

    def __init__(self, home: Path, name: str = "default") -> None:
        if not _NAME.fullmatch(name):
            raise LauncherError(f"instance name {name!r}: use 1 to 64 letters, digits, dots, dashes or underscores")
        self.name = name
        self.home = home.absolute()
        self.folder = self.home / "run" / name
        self.logs = self.folder / "logs"
        self.link_token = self.folder / "link.token"
        self.redis_data = self.folder / "redis"
        self._state_file = self.folder / "state.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other launchers away from this instance; LauncherError when one is at work. Makes the folder."""
        for attempt in itertools.count(1):
            try:
                self.folder.parent.parent.mkdir(parents=True, exist_ok=True)
                for part in (self.folder.parent, self.folder, self.logs):
                    _make_private(part)
                folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS:  # another launcher is removing it
                    continue
                raise LauncherError(f"cannot write to {self.folder}: {error.strerror}; set SCALELLM_HOME") from None
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The folder that was locked may have been removed meanwhile: then it guards nothing.
                if self.folder.exists() and os.path.samestat(os.fstat(folder), self.folder.lstat()):
                    yield
                    return
            except BlockingIOError:
                raise LauncherError(
                    f"another scalellm up, run or down is at work on instance {self.name!r}; wait for it to end"
                ) from None
            finally:
                os.close(folder)

    def load(self) -> State | None:
        """The state as last written; None when nothing was started."""
        try:
            raw = json.loads(self._read_own(self._state_file))
            supervisor = raw.get("supervisor")
            return State(
                **{
                    **raw,
                    "services": tuple(ServiceRecord(**service) for service in raw["services"]),
                    "supervisor": supervisor and ServiceRecord(**supervisor),
                }
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LauncherError(
                f"cannot read {self._state_file} ({error}); end the services by hand and remove {self.folder}"
            ) from None

    def save(self, state: State) -> None:
        """Write the state; a reader sees the old one or the new one, whole."""
        partial = self._state_file.with_suffix(".partial")
        write_new(partial, json.dumps(asdict(state), indent=2) + "\n")
        partial.replace(self._state_file)

    def read_announced(self, service: str) -> list[str]:
        """The lines in which a service says where it listens. Raises LauncherError."""
        return self._read_own(self.announce_file(service)).splitlines()

    def _read_own(self, path: Path) -> str:
        """The text of a file of this user's. Raises LauncherError for a link, and for somebody else's."""
        for part in (self.folder.parent, self.folder):
            _check_own(part)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise LauncherError(f"{path} is a link, which is not followed; remove it") from None
            raise
        with open(descriptor, encoding="utf-8") as stream:
            if os.fstat(descriptor).st_uid != os.geteuid():
                raise LauncherError(f"{path} belongs to another user; set SCALELLM_HOME to a folder of your own")
            return stream.read()

    def log_file(self, service: str) -> Path:
        """Return the file of a service's output."""
        return self.logs / f"{service}.log"

    def announce_file(self, service: str) -> Path:
        """Return the file in which a service names the address at which it listens."""
        return self.folder / f"{service}.address"

    def remove(self, *, keep_logs: bool, keep_data: bool = False) -> None:
        """Forget the instance: remove its folder, or all of it but the logs and the embedded Redis's data."""
        kept = [folder for folder, is_kept in ((self.logs, keep_logs), (self.redis_data, keep_data)) if is_kept]
        if not any(folder.exists() and any(folder.iterdir()) for folder in kept):
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.iterdir():
            if path in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _check_own(folder: Path) -> os.stat_result:
    """Status of a folder. Raises OSError, and LauncherError unless it is this user's own and no link to one."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        what = "a link, which is not followed" if stat.S_ISLNK(status.st_mode) else "no folder"
        raise LauncherError(f"{folder} is {what}; remove it, or set SCALELLM_HOME")
    if status.st_uid != os.geteuid():
        raise LauncherError(f"{folder} belongs to another user; set SCALELLM_HOME to a folder of your own")
    return status


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can enter, or make one that is there such a folder. Raises LauncherError."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if stat.S_IMODE(_check_own(folder).st_mode) != 0o700:
        folder.chmod(0o700)
