"""The table of `scalellm status`."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from scalellm.cli.output import Terminal
from scalellm.launcher import InstanceStatus, ServiceStatus

# Columns that are left out, in this order, to fit a service into one line; --json and a pipe have all of them.
_OPTIONAL_COLUMNS = ("compute", "restarts", "model", "memory", "address", "up")
_ANY_WIDTH = 1000

_IDLE = " (no decode step so far was computed in C++ alone, by one rank)"


def fitting_table(console: Terminal, services: tuple[ServiceStatus, ...]) -> Table:
    """Return the table with the columns that leave each service its one line, where that can be had."""
    for number in range(len(_OPTIONAL_COLUMNS) + 1):
        table = status_table(services, _OPTIONAL_COLUMNS[:number])
        needed = console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum
        if not console.is_terminal or needed <= console.width:
            break
    return table


def status_table(services: tuple[ServiceStatus, ...], left_out: tuple[str, ...] = ()) -> Table:
    """Return the table of services, without the columns in `left_out`."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    rows = [_status_cells(service) for service in services]
    if not any(service.restarts.count for service in services):
        left_out = (*left_out, "restarts")
    columns = [column for column in rows[0] if column not in left_out]
    for column in columns:
        # On a narrow terminal these three go on in the next line, and the others stay as they are.
        can_fold = column in ("address", "load", "model", "compute")
        justify: JustifyMethod = "right" if column in ("pid", "up", "restarts", "memory") else "left"
        table.add_column(column, no_wrap=not can_fold, overflow="fold", justify=justify)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def _status_cells(service: ServiceStatus) -> dict[str, str | Text]:
    return {
        "service": service.name,
        "health": Text(service.health, style="green" if service.health == "serving" else "bold red"),
        "pid": "-" if service.pid is None else str(service.pid),
        "address": service.address or "-",
        "up": "-" if service.uptime_s is None else _duration(service.uptime_s),
        "restarts": str(service.restarts.count),
        "memory": "-" if service.memory_bytes is None else f"{service.memory_bytes / 2**20:.0f} MiB",
        "load": _load(service.load),
        "model": service.model or "-",
        "compute": service.compute or "-",
    }


def _load(load: Mapping[str, int]) -> str:
    if not load:
        return "-"
    if "keys" in load:
        return f"{load['keys']} keys"
    if "queued" in load:
        return (
            f"{load['running']} running, {load['queued']} queued, "
            f"{load['executors_ready']}/{load['executors']} executors"
        )
    used = load["total_blocks"] - load["free_blocks"]
    return f"{load['running']} running, {load['waiting']} waiting, {used}/{load['total_blocks']} blocks"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def engine_lines(status: InstanceStatus) -> list[str]:
    """Return lines about how executors run their models, each with the model's name if there are several: the forms
    that weights are held in, if tokens are guessed, and the instructions of the C++ kernels.
    """
    engines = [service for service in status.services if service.weights]
    are_several = len({service.model for service in engines}) > 1
    told: dict[str, None] = {}
    for service in engines:
        of = f" of {service.model}" if are_several else ""
        told[f"weights{of}: {service.weights}"] = None
        if service.speculation:  # executors of older versions do not say
            told[f"speculation{of}: {service.speculation}{_IDLE if service.speculation == 'idle' else ''}"] = None
        if service.instructions:  # a GPU has none
            told[f"instructions{of}: {service.instructions}"] = None
    return list(told)
