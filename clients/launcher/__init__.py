"""Starts, stops and describes the services of one machine."""

from clients.launcher.down import DownResult, bring_down
from clients.launcher.errors import LauncherError, NotRunningError
from clients.launcher.foreground import run_in_foreground
from clients.launcher.instance import Instance, State
from clients.launcher.launch import Report
from clients.launcher.plan import PUBLIC_PORT, EngineKind, UpOptions
from clients.launcher.status import InstanceStatus, ServiceStatus, read_status
from clients.launcher.supervision import check_not_running, running_state
from clients.launcher.up import bring_up

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
