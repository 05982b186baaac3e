"""Brings an instance down, whatever is left of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scalellm.launcher.errors import NotRunningError
from scalellm.launcher.instance import EXECUTOR, REDIS, SCHEDULER, TOKENIZER, Instance
from scalellm.launcher.processes import find, terminate
from scalellm.launcher.redis_server import remove_scratch
from scalellm.launcher.supervision import stand_down

# Work comes in at the front: each service is gone before what it sends its work to.
_ORDER = (TOKENIZER, SCHEDULER, EXECUTOR, REDIS)

# A service is given its drain limit, and then this long for closing what it holds, in seconds.
_MARGIN = 5.0


@dataclass(frozen=True, slots=True)
class DownResult:
    """Outcome of `down`.

    `crashed` had ended before, and may hold the supervisor; `killed` did not end in time; `restarted` had crashed and
    been started again; `logs` is where the logs are, if kept.
    """

    stopped: tuple[str, ...]
    crashed: tuple[str, ...]
    killed: tuple[str, ...]
    restarted: tuple[str, ...]
    logs: str


def bring_down(instance: Instance, on_stopping: Callable[[str], None], limit: float | None = None) -> DownResult:
    """Drain and end every service and remove the instance's files; the logs stay when something went wrong.

    Args:
        instance: The instance to bring down.
        on_stopping: Called with a service's name when it is asked to end.
        limit: Seconds that each service gets to end; default: the instance's drain limit and a little.

    Raises NotRunningError when nothing was started.
    """
    if not instance.folder.exists():
        raise NotRunningError(f"not running (instance {instance.name!r})")
    with instance.locked():
        state = instance.load()
        if state is None:
            instance.remove(keep_logs=True)
            raise NotRunningError(f"not running (instance {instance.name!r})")
        was_supervised = stand_down(instance)
        state = instance.load() or state
        crashed = [service.name for service in state.services if not find(service)]
        if state.supervisor is not None and not was_supervised:
            crashed.append(state.supervisor.name)
        stopped: list[str] = []
        killed: list[str] = []
        for kind in _ORDER:
            services = state.of_kind(kind)
            for service in services:
                if service.name not in crashed:
                    on_stopping(service.name)
            left = [
                service.name for service in terminate(services, state.drain_limit + _MARGIN if limit is None else limit)
            ]
            killed += left
            stopped += [service.name for service in services if service.name not in (*left, *crashed)]
        remove_scratch(state.scratch)
        restarted = tuple(service.name for service in state.services if service.restarts)
        keep_logs = bool(crashed or killed or restarted)
        instance.remove(keep_logs=keep_logs)
    logs = str(instance.logs) if keep_logs else ""
    return DownResult(tuple(stopped), tuple(crashed), tuple(killed), restarted, logs)
