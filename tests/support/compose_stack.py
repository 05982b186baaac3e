"""The containers of compose.yaml under a project name, a port and image tags of their own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("redis", "executor", "scheduler", "tokenizer")
_PYTHON = "python:3.11-slim-bookworm"
_REDIS = "redis:7-bookworm"


@cache
def why_no_docker() -> str:
    """Return the reason why containers cannot run here; empty if they can."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    for command in (["docker", "info", "--format", "{{.ServerVersion}}"], ["docker", "compose", "version"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
            return f"`{' '.join(command)}` fails: {said[-1]}"
    return ""


def docker(*arguments: str, timeout: float = 120, env: Mapping[str, str] | None = None) -> str:
    """Run docker; its output. Fails with what it said."""
    command = ["docker", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


class ComposeStack:
    """One project. `down` leaves nothing of it but the images, `remove_images` not even those.

    Args:
        variables: Environment variables for compose, beside those of tags and ports.
    """

    def __init__(self, **variables: str) -> None:
        self.project = f"scalellm-test-{uuid.uuid4().hex[:8]}"
        self._release = 1
        self.address = f"127.0.0.1:{free_port()}"
        self.http_address = f"127.0.0.1:{free_port()}"
        self.prometheus_address = f"127.0.0.1:{free_port()}"
        self._environment = {
            **os.environ,
            "COMPOSE_FILE": "compose.yaml",
            "SCALELLM_TAG": self.tag,
            "SCALELLM_LISTEN": self.address,
            "SCALELLM_HTTP_LISTEN": self.http_address,
            "SCALELLM_PROMETHEUS_LISTEN": self.prometheus_address,
            "SCALELLM_PROMETHEUS_IMAGE": self.image("prometheus"),
            # As they are on this machine: an image that no registry gave it has no digest.
            "SCALELLM_PYTHON_IMAGE": _PYTHON,
            "SCALELLM_REDIS_IMAGE": _REDIS,
            **variables,
        }

    @property
    def tag(self) -> str:
        """The tag of the images in use."""
        return f"{self.project}.{self._release}"

    def set(self, name: str, value: str) -> None:
        """From now on compose is told something else."""
        self._environment[name] = value

    def new_release(self) -> None:
        """From now on images have another tag; those of the former release stay."""
        self._release += 1
        self.set("SCALELLM_TAG", self.tag)

    def compose(self, *arguments: str, timeout: float = 300) -> str:
        """Run docker compose on the project; its output."""
        return docker("compose", "-p", self.project, *arguments, timeout=timeout, env=self._environment)

    def containers(self, service: str) -> list[str]:
        """The ids of a service's running containers."""
        return self.compose("ps", "-q", service).split()

    def wait_running(self, service: str, count: int, limit: float = 120) -> None:
        """Wait until a service has so many containers, all of them healthy."""
        deadline = time.monotonic() + limit
        while True:
            states = [inspect(container)["State"] for container in self.containers(service)]
            if len(states) == count and all(state.get("Health", {}).get("Status") == "healthy" for state in states):
                return
            assert time.monotonic() < deadline, f"{service}: {states}\n{self.compose('logs', '--tail', '20', service)}"
            time.sleep(0.5)

    def image(self, service: str) -> str:
        """The name of a service's image."""
        return f"scalellm/{service}:{self.tag}"

    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes of each image, and how many of them its base does not have."""
        bases = {"redis": _REDIS}
        sizes = {}
        for service in SERVICES:
            size, base = (_image_size(name) for name in (self.image(service), bases.get(service, _PYTHON)))
            sizes[service] = size, size - base
        return sizes

    def start_prometheus(self) -> None:
        """Start the monitoring profile's Prometheus, from an image that is made here."""
        folder = ROOT / "tests" / "compose"
        dockerfile = str(folder / "prometheus.Dockerfile")
        docker("build", "-q", "-t", self.image("prometheus"), "-f", dockerfile, str(folder), timeout=600)
        self.compose("--profile", "monitoring", "up", "-d", "--no-deps", "prometheus")

    def scraped(self) -> Counter[str]:
        """Count the containers of each service that Prometheus reaches."""
        with urlopen(f"http://{self.prometheus_address}/api/v1/targets?state=active", timeout=10) as answer:
            targets = json.load(answer)["data"]["activeTargets"]
        return Counter(target["labels"]["job"] for target in targets if target["health"] == "up")

    def wait_scraped(self, limit: float = 60, **counts: int) -> None:
        """Wait until Prometheus reaches exactly so many containers of each service."""
        deadline = time.monotonic() + limit
        while True:
            with suppress(OSError):  # it is starting
                if (found := self.scraped()) == counts:
                    return
                assert time.monotonic() < deadline, found
            time.sleep(0.5)

    def down(self) -> None:
        """End everything and remove containers, networks and volumes."""
        self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "45")

    def left(self) -> list[str]:
        """Return what still exists of the project: containers, networks, volumes."""
        mine = f"label=com.docker.compose.project={self.project}"
        found = docker("ps", "-aq", "--filter", mine).split()
        for kind in ("network", "volume"):
            found += docker(kind, "ls", "-q", "--filter", mine).split()
        return found

    def remove_images(self) -> None:
        """Remove the project's images; the builder's cache stays."""
        images = docker("image", "ls", "-q", "--filter", f"reference=scalellm/*:{self.project}.*").split()
        if images:
            docker("image", "rm", "--force", *sorted(set(images)))


def store_figures() -> str:
    """Return the state before a build: the images that exist, and the builder's cache."""
    kinds = [json.loads(line) for line in docker("system", "df", "--format", "{{json .}}").splitlines()]
    found = {kind["Type"]: f"{kind['TotalCount']} ({kind['Size']})" for kind in kinds}
    return f"before: images {found['Images']}, build cache {found['Build Cache']}"


def inspect(container: str) -> dict:
    """Return Docker's record of a container."""
    return json.loads(docker("container", "inspect", container))[0]


def crash(container: str) -> None:
    """Kill a container's main process from outside, as the kernel does when memory runs out.

    `docker kill` would do for that, but counts as stopping it by hand: no restart policy would bring it back.
    """
    pid = inspect(container)["State"]["Pid"]
    helper = ("--rm", "--pid=host", "--network=none", "--cap-drop=ALL", "--cap-add=KILL", _PYTHON)
    docker("run", *helper, "sh", "-c", f"kill -9 {pid}")


def _image_size(name: str) -> int:
    return int(docker("image", "inspect", "--format", "{{.Size}}", name))


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
