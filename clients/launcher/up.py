"""Brings an instance up in the background: starts its supervisor and follows what that says until all is healthy."""

from __future__ import annotations

import asyncio
from pathlib import Path

from scalellm.launcher.errors import LauncherError
from scalellm.launcher.instance import Instance, State
from scalellm.launcher.launch import Report
from scalellm.launcher.plan import UpOptions
from scalellm.services.common.child_environment import child_environment
from scalellm.services.common.child_process import ChildProcess, describe_exit, python_module
from scalellm.services.common.json_lines import Message

# The supervisor undoes what it has begun: services that do not end are killed after some seconds.
_UNDO_LIMIT = 30.0


def bring_up(instance: Instance, options: UpOptions, report: Report) -> State:
    """Start everything, or what is missing, and return once all of it is healthy.

    Raises LauncherError when the instance is running already, or when something does not start; then, as on any other
    exception, nothing of it is left but the logs, and what was running before.
    """
    return asyncio.run(_bring_up(instance, options, report))


async def _bring_up(instance: Instance, options: UpOptions, report: Report) -> State:
    supervisor = await ChildProcess.start(
        python_module("scalellm.launcher.supervisor_process"), child_environment(options.environment), own_session=True
    )
    try:
        message = await supervisor.ask(assignment(instance, options))
        while message is not None and not message.keys() & {"up", "error"}:
            getattr(report, message["event"])(*message["arguments"])
            message = await supervisor.answer()
    except BaseException:
        await supervisor.end(_UNDO_LIMIT)
        raise
    if message is None:
        how = describe_exit(await supervisor.wait())
        raise LauncherError(f"the supervisor ended with {how}; end what it has started with: scalellm down")
    await supervisor.leave()
    if "error" in message:
        raise LauncherError(message["error"])
    state = instance.load()
    assert state is not None
    return state


def assignment(instance: Instance, options: UpOptions) -> Message:
    """Return the instructions for the supervisor's process."""
    return {"home": str(instance.home), "name": instance.name, "options": options.to_message()}


def read_assignment(message: Message) -> tuple[Instance, UpOptions]:
    """The opposite of `assignment`."""
    return Instance(Path(message["home"]), message["name"]), UpOptions.from_message(message["options"])
