"""What the launcher remembers of an instance: `<home>/run/<name>/`, gone once the instance is down.

The folder holds the state file, the services' logs and announced addresses, and the embedded Redis's socket. It is also
the lock: one `up` or `down` at a time holds an flock on it, which the kernel releases whatever happens to its holder.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clients.launcher.errors import LauncherError

REDIS, EXECUTOR, SCHEDULER, TOKENIZER = "redis", "executor", "scheduler", "tokenizer"
_KINDS = (REDIS, EXECUTOR, SCHEDULER, TOKENIZER)

# Another launcher removes the folder once; a file system on which it cannot be made (/proc) says "not found" for ever.
_ATTEMPTS = 100

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """One process that was started, the leader of a session of its own.

    `create_time` (seconds since the epoch, from psutil) tells the process from a later one with the same pid.
    `address` is host:port, or a socket's path for Redis; empty until the service has announced it.
    """

    name: str
    kind: str
    pid: int
    create_time: float
    log: str
    address: str = ""
    metrics_address: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """An instance as last written. `redis_url` is what the services were given, the embedded one's or the user's."""

    model: str
    redis_url: str
    drain_limit: float
    services: tuple[ServiceRecord, ...] = ()
    scratch: str = ""

    def with_service(self, record: ServiceRecord) -> State:
        """The same with `record` added, or in place of the one with its name."""
        services = {service.name: service for service in self.services} | {record.name: record}
        # What others depend on comes first, whatever was started first.
        return replace(self, services=tuple(sorted(services.values(), key=lambda service: _KINDS.index(service.kind))))

    def of_kind(self, kind: str) -> tuple[ServiceRecord, ...]:
        """The services of one kind, in the order in which they were started."""
        return tuple(service for service in self.services if service.kind == kind)

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
        self.folder = home.absolute() / "run" / name
        self.logs = self.folder / "logs"
        self._state_file = self.folder / "state.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other launchers away from this instance; LauncherError when one is at work. Makes the folder."""
        for attempt in itertools.count(1):
            try:
                self.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
                self.folder.chmod(0o700)
                folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS:  # another launcher is removing it
                    continue
                raise LauncherError(f"cannot write to {self.folder}: {error.strerror}; set SCALELLM_HOME") from None
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The folder that was locked may have been removed meanwhile: then it guards nothing.
                if self.folder.exists() and os.path.samestat(os.fstat(folder), self.folder.stat()):
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
            raw = json.loads(self._state_file.read_text(encoding="utf-8"))
            return State(**{**raw, "services": tuple(ServiceRecord(**service) for service in raw["services"])})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LauncherError(
                f"cannot read {self._state_file} ({error}); end the services by hand and remove {self.folder}"
            ) from None

    def save(self, state: State) -> None:
        """Write the state; a reader sees the old one or the new one, whole."""
        partial = self._state_file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        partial.replace(self._state_file)

    def log_file(self, service: str) -> Path:
        """Where a service's output goes."""
        return self.logs / f"{service}.log"

    def announce_file(self, service: str) -> Path:
        """Where a service says at which address it listens."""
        return self.folder / f"{service}.address"

    def remove(self, *, keep_logs: bool) -> None:
        """Forget the instance: remove its folder, or all of it but the logs, if there are any."""
        if not keep_logs or not any(self.logs.iterdir()):
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.iterdir():
            if path != self.logs:
                path.unlink(missing_ok=True)
