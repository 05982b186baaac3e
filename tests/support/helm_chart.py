"""The chart, rendered by helm."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "chart"

Manifest = dict[str, Any]


def find_helm() -> str | None:
    """Return the command helm: what HELM says, or the one on the path; None where there is none."""
    return os.environ.get("HELM") or shutil.which("helm")


def run_helm(*arguments: str, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm on values that are given as its standard input."""
    helm = find_helm()
    assert helm is not None
    command = [helm, *arguments, *(("--values", "-") if values is not None else ())]
    given = yaml.safe_dump(dict(values)) if values is not None else None
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, check=False)


def render(
    values: Mapping[str, Any], kubernetes: str = "1.37.0", release: str = "line", apis: Sequence[str] = ()
) -> list[Manifest]:
    """All objects of a release in the namespace `space`; `apis` are there beside Kubernetes' own."""
    options = ("--kube-version", kubernetes, "--namespace", "space", *(f"--api-versions={api}" for api in apis))
    done = run_helm("template", release, str(CHART), *options, values=values)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def refusal(values: Mapping[str, Any], kubernetes: str = "1.37.0") -> str:
    """Return helm's message about values that it refuses."""
    done = run_helm("template", "line", str(CHART), "--kube-version", kubernetes, values=values)
    assert done.returncode != 0, "the values were accepted"
    return done.stderr


def of_kind(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    """The objects of a kind by name."""
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind}


def workloads(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Deployments, StatefulSets and LeaderWorkerSets by name."""
    kinds = ("Deployment", "StatefulSet", "LeaderWorkerSet")
    return {name: workload for kind in kinds for name, workload in of_kind(manifests, kind).items()}


def pod_template(workload: Manifest) -> Manifest:
    """Return what the pods of a workload are made from."""
    spec = workload["spec"]
    template: Manifest = spec.get("template") or spec["leaderWorkerTemplate"]["workerTemplate"]
    return template


def component(manifest: Manifest) -> str:
    """Return the service that an object is part of."""
    return manifest["metadata"]["labels"]["app.kubernetes.io/component"]
