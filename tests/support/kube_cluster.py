"""A real API server with its controllers: started by the script that CLUSTER_LAB names, used by kubectl and helm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from compose_stack import docker
from helm_chart import CHART, Manifest
from service_processes import start_process

HOLLOW = {"cluster-lab/node": "hollow"}
"""Labels of nodes that only pretend to run containers: their pods are ready, and nothing is in them."""
REAL = {"cluster-lab/node": "real"}
"""Labels of nodes that run them."""
LIMIT = 600.0
"""Seconds for what takes one minute at most on an idle machine."""
_Found = TypeVar("_Found")
_UP = ("--hollow", "2")
_DOWN = 3
"""Exit status of the script's `status` where nothing runs."""


def until(found: Callable[[], _Found], what: str, limit: float = LIMIT) -> _Found:
    """Return what the function returns as soon as that is true. Fails after the limit, in seconds."""
    deadline = time.monotonic() + limit
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {limit:.0f} s: {what}"
        time.sleep(0.5)
    return value


class KubeCluster:
    """The cluster, as a context manager. One that ran before is used as it is, and left.

    The script is asked for `status` (which ends with 3 where nothing runs), `up --hollow 2` (which prints the line that
    sets KUBECONFIG and PATH, with kubectl and helm on it) and `down`; for a node with real containers also for
    `up --hollow 2 --kubelet` (`status` says then `engine of the real node: ` and the address of its Docker engine) and
    `load IMAGE...`, which brings images there from the engine that docker uses.
    """

    def __init__(self) -> None:
        self._script = os.environ["CLUSTER_LAB"]
        self._environment: dict[str, str] = {}
        self._was_down = False

    def __enter__(self) -> KubeCluster:
        status = subprocess.run([self._script, "status"], capture_output=True, timeout=LIMIT, check=False)
        self._was_down = status.returncode == _DOWN
        try:
            said = self._lab("up", *_UP)
            printed = subprocess.run(
                ["bash", "-c", 'eval "$1"; printf "%s\\n" "$KUBECONFIG" "$PATH"', "bash", said],
                capture_output=True,
                text=True,
                check=True,
            )
            config, path = printed.stdout.splitlines()
            self._environment = {**os.environ, "KUBECONFIG": config, "PATH": path}
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._was_down:
            self._lab("down")

    def add_real_node(self) -> None:
        """Start the node that runs containers, unless it runs."""
        self._lab("up", *_UP, "--kubelet")

    def load(self, *images: str) -> None:
        """Bring images to the real node."""
        self._lab("load", *images)

    def docker(self, *arguments: str) -> str:
        """Run docker on the real node's engine; its output."""
        said = self._lab("status")
        (engine,) = re.findall("^engine of the real node: (.*)$", said, re.MULTILINE)
        return docker(*arguments, env={**os.environ, "DOCKER_HOST": engine})

    def kubectl(self, *arguments: str, given: str | None = None, limit: float = LIMIT) -> str:
        """Run kubectl; its output. Fails with what it said."""
        done = self.try_kubectl(*arguments, given=given, limit=limit)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_kubectl(
        self, *arguments: str, given: str | None = None, limit: float = LIMIT
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl, whatever comes of it."""
        return self._run(["kubectl", *arguments], given, limit)

    def start_kubectl(self, *arguments: str) -> subprocess.Popen[str]:
        """Start kubectl, whose output is read while it runs."""
        command = ["kubectl", *arguments]
        return start_process(command, env=self._environment, stdout=subprocess.PIPE, text=True)

    def get(self, kind: str, namespace: str, selector: str = "") -> list[Manifest]:
        """Objects of a kind, as the API has them."""
        said = self.kubectl("get", kind, "-n", namespace, "-l", selector, "-o", "json")
        return list(json.loads(said)["items"])

    def inventory(self, namespace: str) -> set[str]:
        """Names of all objects in a namespace but events, as kind/name."""
        kinds = self.kubectl("api-resources", "--verbs=list", "--namespaced", "-o", "name").split()
        listed = ",".join(kind for kind in kinds if not kind.startswith("events"))
        return set(self.kubectl("get", listed, "-n", namespace, "-o", "name").split())

    def nodes(self, labels: Mapping[str, str]) -> list[str]:
        """Names of the nodes with some labels."""
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        said = self.kubectl("get", "nodes", "-l", selector, "-o", "name")
        return [node.removeprefix("node/") for node in said.split()]

    def is_cordoned(self, node: str) -> bool:
        """Return whether the node takes no pods."""
        return self.kubectl("get", "node", node, "-o", "jsonpath={.spec.unschedulable}") == "true"

    def drain(self, node: str) -> str:
        """Drain a node, and return what kubectl says meanwhile."""
        done = self.try_kubectl(
            "drain", node, "--delete-emptydir-data", "--ignore-daemonsets", f"--timeout={LIMIT:.0f}s"
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    @contextmanager
    def applied(self, manifest: Manifest) -> Iterator[None]:
        """Make an object that is gone afterwards."""
        given = json.dumps(manifest)
        self.kubectl("apply", "-f", "-", given=given)
        try:
            yield
        finally:
            self.kubectl("delete", "-f", "-", given=given)

    @contextmanager
    def namespace(self, name: str) -> Iterator[set[str]]:
        """Make a namespace that is gone afterwards with all in it; its value is the objects that are in it at first."""
        self.kubectl("create", "namespace", name)
        try:
            with_account = "serviceaccount/default"
            until(lambda: with_account in self.inventory(name), "the account that each namespace has")
            yield self.inventory(name)
        finally:
            self.kubectl("delete", "namespace", name)

    def install(self, release: str, namespace: str, values: Mapping[str, Any], *options: str) -> None:
        """Have helm install or upgrade a release of the chart, as the documents do."""
        # Servers before 1.22 do not know how helm 4 applies objects by default.
        command = ("upgrade", "--install", release, str(CHART), "--server-side=false", *options, "--values", "-")
        self._helm(*command, namespace=namespace, given=yaml.safe_dump(dict(values)))

    def roll_back(self, release: str, namespace: str, *options: str) -> None:
        """Have helm go back to the revision before."""
        self._helm("rollback", release, "--server-side=false", *options, namespace=namespace)

    def uninstall(self, release: str, namespace: str) -> None:
        """Have helm remove a release."""
        self._helm("uninstall", release, namespace=namespace)

    def told(self, namespace: str) -> str:
        """Return the states of the pods and the last events, which tell why pods are not ready."""
        parts = [
            self.try_kubectl("get", "pods", "-n", namespace, "-o", "wide").stdout,
            self.try_kubectl("get", "events", "-n", namespace, "--sort-by=.lastTimestamp").stdout[-4000:],
        ]
        return "\n".join(parts)

    def _helm(self, *arguments: str, namespace: str, given: str | None = None) -> None:
        done = self._run(["helm", *arguments, "--namespace", namespace], given, LIMIT + 60)
        assert done.returncode == 0, f"helm {arguments[0]}: {done.stdout}{done.stderr}\n{self.told(namespace)}"

    def _lab(self, *arguments: str) -> str:
        done = subprocess.run(
            [self._script, *arguments], capture_output=True, text=True, timeout=3 * LIMIT, cwd=Path("/"), check=False
        )
        assert done.returncode == 0, f"{self._script} {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def _run(self, command: list[str], given: str | None, limit: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, input=given, env=self._environment, capture_output=True, text=True, timeout=limit, check=False
        )
