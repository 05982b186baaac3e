"""`python -m bench.startup`: from `scalellm up` to the first token, and where that time goes.

Runs the command as a user would, with the model on disk, and watches from outside: when each process came to be, when
each service listened, and what the engine logged. CPU time is that of a service's processes when the first token is
there; it holds on a busy machine, wall-clock times do not.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated

import grpc
import psutil
import typer
from rich.console import Console
from rich.table import Table

from bench.services.processes import BenchError, cpu_seconds, family
from scalellm.launcher import Instance
from scalellm.v1 import generation_pb2, generation_pb2_grpc

_LOG_TIME = "%Y-%m-%d %H:%M:%S,%f"
_LOG_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \w+ [^:]*: (.*)$", re.MULTILINE)
_TARGET_S = 8.0


def _logged(log: str, beginning: str) -> float:
    """Return when a service first logged a message that begins so, in seconds of the system's clock."""
    for stamp, message in _LOG_LINE.findall(Path(log).read_text(encoding="utf-8")):
        if message.startswith(beginning):
            return datetime.strptime(stamp, _LOG_TIME).timestamp()
    raise BenchError(f"{log} has no line that begins with {beginning!r}")


def _first_token(address: str) -> None:
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        request = generation_pb2.GenerateRequest(prompt="Once upon a time")
        request.sampling.max_tokens = 1
        call = generation_pb2_grpc.GenerationStub(channel).Generate(request)
        for response in call:
            if response.WhichOneof("event") == "delta":
                return
    raise BenchError("the answer had no token")


def start_once(home: Path, model: str, environment: Mapping[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    """Bring an instance up and down. Returns when what had happened, in seconds since the command, and CPU seconds."""
    instance = Instance(home, f"startup-{os.getpid()}")
    command = [sys.executable, "-m", "scalellm.cli.main", "--instance", instance.name]
    # Services of their own, whatever address or Redis the user has.
    variables = {**environment, "SCALELLM_HOME": str(home), "REDIS_URL": "", "SCALELLM_ADDRESS": ""}
    began = time.time()
    try:
        up = subprocess.Popen(
            [*command, "up", "--model", model, "--port", "0"],
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Processes' ages count from the machine's start, whose time is known to some tenths of a second.
        skew = psutil.Process(up.pid).create_time() - began
        _, errors = up.communicate()
        returned = time.time()
        if up.returncode:
            raise BenchError(errors)
        state = instance.load()
        assert state is not None
        _first_token(state.public_address)
        token = time.time()
        services = {service.name: service for service in state.services}
        families = {name: family(service.pid) for name, service in services.items()}
        executor = services["executor-0"]
        (engine,) = psutil.Process(executor.pid).children()
        moments = {
            "command line: first process spawned": executor.create_time - skew,
            "executor: listens": instance.announce_file("executor-0").stat().st_mtime,
            "executor: engine process spawned": engine.create_time() - skew,
            "executor: imports done, model found": _logged(executor.log, "loading "),
            "executor: weights loaded": _logged(executor.log, "KV cache"),
            "executor: ready": _logged(executor.log, "serving "),
            "scheduler: spawned": services["scheduler"].create_time - skew,
            "scheduler: listens": instance.announce_file("scheduler").stat().st_mtime,
            "tokenizer: spawned": services["tokenizer"].create_time - skew,
            "tokenizer: workers serve": instance.announce_file("tokenizer").stat().st_mtime,
            "`up` has returned": returned,
            "first token": token,
        }
        cpu = {name: sum(map(cpu_seconds, members)) for name, members in families.items()}
        return {name: moment - began for name, moment in moments.items()}, cpu
    finally:
        subprocess.run([*command, "down"], env=variables, capture_output=True)


def main(
    model: Annotated[str, typer.Option(help="A name of the model store, or a path.")] = "smollm2-135m-instruct",
    rounds: Annotated[int, typer.Option(min=1, help="Starts; the first one warms the disk's cache up.")] = 5,
    home: Annotated[Path, typer.Option(envvar="SCALELLM_HOME", help="The model store.")] = Path("~/.cache/scalellm"),
) -> None:
    """Print a table: seconds after the command, the median of all starts and the fastest one."""
    runs = [start_once(home.expanduser(), model, os.environ) for _ in range(rounds)]
    console = Console(width=None if os.isatty(1) else 120)
    table = Table(title=f"{model}, {os.cpu_count()} cores, {rounds} starts", title_justify="left")
    for header in ("seconds after the command", "median", "fastest"):
        table.add_column(header, justify="left" if header.startswith("seconds") else "right")
    for name in sorted(runs[0][0], key=lambda name: statistics.median(moments[name] for moments, _ in runs)):
        values = [moments[name] for moments, _ in runs]
        table.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f}")
    console.print(table)
    shown = ", ".join(f"{name} {statistics.median(cpu[name] for _, cpu in runs):.2f}" for name in runs[0][1])
    console.print(f"CPU seconds until the first token: {shown}")
    total = statistics.median(moments["first token"] for moments, _ in runs)
    verdict = "met" if total < _TARGET_S else "missed"
    console.print(f"first token after {total:.2f} s; target: less than {_TARGET_S:g} s, {verdict}")


if __name__ == "__main__":
    typer.run(main)
