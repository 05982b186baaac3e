"""A release of the chart in a cluster, and its pods."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helm_chart import Manifest
from kube_cluster import LIMIT, KubeCluster

RELEASE = "line"
COMPONENTS = ("tokenizer", "scheduler", "executor", "redis")
WAIT = ("--wait", "--timeout", f"{LIMIT:.0f}s")


@dataclass(frozen=True)
class Pod:
    """A pod that is not about to go."""

    name: str
    uid: str
    node: str
    image: str
    address: str
    is_ready: bool

    @classmethod
    def of(cls, manifest: Manifest) -> Pod:
        metadata, spec = manifest["metadata"], manifest["spec"]
        ready = [each["status"] for each in manifest["status"].get("conditions", ()) if each["type"] == "Ready"]
        image = spec["containers"][0]["image"]
        address = manifest["status"].get("podIP", "")
        return cls(metadata["name"], metadata["uid"], spec.get("nodeName", ""), image, address, ready == ["True"])


class ChartRelease:
    """The release `line` in a namespace.

    Attributes:
        values: Values of the chart, from the next upgrade on.
    """

    def __init__(self, cluster: KubeCluster, namespace: str, values: Mapping[str, Any]) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.values = dict(values)

    def install(self, *options: str, **values: Any) -> None:
        """Install or upgrade it, with some values changed; with WAIT, until it is ready."""
        self.cluster.install(RELEASE, self.namespace, {**self.values, **values}, *options)

    def upgrade(self, tag: str) -> None:
        """Install it, or upgrade to other images, and wait as `helm --wait` does."""
        self.install(*WAIT, image={"tag": tag})

    def roll_back(self) -> None:
        """Go back to the revision before the upgrade, and wait as `helm --wait` does."""
        self.cluster.roll_back(RELEASE, self.namespace, *WAIT)

    def pods(self, component: str) -> list[Pod]:
        """Pods of a component, without those that are being deleted."""
        selector = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component={component}"
        found = self.cluster.get("pods", self.namespace, selector)
        return [Pod.of(each) for each in found if "deletionTimestamp" not in each["metadata"]]

    def tags(self) -> set[str]:
        """The tags of the images of all pods."""
        return {pod.image.rpartition(":")[2] for component in COMPONENTS for pod in self.pods(component)}

    def ready(self) -> dict[str, int]:
        """Number of pods of each component; -1 while one of them is not ready."""
        found = {component: self.pods(component) for component in COMPONENTS}
        return {each: len(pods) if all(pod.is_ready for pod in pods) else -1 for each, pods in found.items()}

    def scale_executors(self, count: int) -> None:
        """Set the number of executors, as an operator does, and do not wait."""
        target = f"deployment/{RELEASE}-scalellm-executor-cpu"
        self.cluster.kubectl("scale", target, "-n", self.namespace, f"--replicas={count}")

    def watch_ready(self, component: str) -> subprocess.Popen[str]:
        """Start a process that prints the addresses of the ready pods in a line, now and whenever they change."""
        service = f"{RELEASE}-scalellm-{component}"
        addresses = r'jsonpath={.subsets[*].addresses[*].ip}{"\n"}'
        return self.cluster.start_kubectl("get", "endpoints", service, "-n", self.namespace, "--watch", "-o", addresses)

    def crash(self, component: str, pod: Pod) -> None:
        """Kill the main process of a pod's container, as the kernel does when memory runs out."""
        is_it = {"pod.namespace": self.namespace, "pod.name": pod.name, "container.name": component}
        filters = [part for key, value in is_it.items() for part in ("--filter", f"label=io.kubernetes.{key}={value}")]
        (container,) = self.cluster.docker("ps", "-q", *filters).split()
        self.cluster.docker("kill", "--signal", "KILL", container)

    def delete_at_once(self, pod: Pod) -> None:
        """Delete a pod without the time to end in peace that it would have."""
        self.cluster.kubectl("delete", "pod", pod.name, "-n", self.namespace, "--force", "--grace-period=0")

    def evict(self, pod: Pod) -> str:
        """Ask for an eviction, as a drain does for each pod; what the API refuses it with, or nothing."""
        target = {"name": pod.name, "namespace": self.namespace}
        body = json.dumps({"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": target})
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod.name}/eviction"
        return self.cluster.try_kubectl("create", "--raw", path, "-f", "-", given=body).stderr
