"""Starts, stops and describes the services of one machine."""

from scalellm.launcher.down import DownResult, bring_down
from scalellm.launcher.errors import LauncherError, NotRunningError
from scalellm.launcher.foreground import run_in_foreground
from scalellm.launcher.instance import Instance, State
from scalellm.launcher.launch import Report
from scalellm.launcher.plan import PUBLIC_PORT, EngineKind, UpOptions
from scalellm.launcher.status import InstanceStatus, ServiceStatus, read_status
from scalellm.launcher.supervision import check_not_running, running_state
from scalellm.launcher.up import bring_up

__all__ = [
    "PUBLIC_PORT",
    "DownResult",
    "EngineKind",
    "Instance",
    "InstanceStatus",
    "LauncherError",
    "NotRunningError",
    "Report",
    "ServiceStatus",
    "State",
    "UpOptions",
    "bring_down",
    "bring_up",
    "check_not_running",
    "read_status",
    "run_in_foreground",
    "running_state",
]
