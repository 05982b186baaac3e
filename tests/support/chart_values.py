"""Sets of values of the chart, and what helm makes of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from helm_chart import Manifest, render

SECURE = {"security": {"enabled": True}}
SCALED = {"enabled": True, "minReplicas": 0, "maxReplicas": 9}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "secure": SECURE,
    "secure behind a gateway": {"security": {"enabled": True, "edgeTls": False, "secretPrefix": "mine"}},
    "clients with certificates": {
        "security": {"enabled": True, "clientCertificates": True, "edgeName": "api.example.com"},
        "tokenizer": {"service": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["203.0.113.0/24"]}},
    },
    "pools": {
        "model": "/var/lib/scalellm/models/llama",
        "tokenizer": {
            "aliases": {"chat": {"/var/lib/scalellm/models/llama": 95, "mixtral": 5}, "gpt-4.1": {"mixtral": 0.5}}
        },
        "models": {"pull": False, "volume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}},
        "executors": [
            {"name": "cpu", "replicas": 2, "settings": {"quantization": "int8"}},
            {
                "name": "gpu",
                "device": "cuda",
                "maxSurge": 0,
                "maxUnavailable": 1,
                "runtimeClassName": "nvidia",
                "nodeSelector": {"accelerator": "h200"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "modelVolume": {"hostPath": {"path": "/srv/models", "type": "Directory"}},
                "kernelVolume": {"hostPath": {"path": "/srv/kernels", "type": "DirectoryOrCreate"}},
                "settings": {"max_num_batched_tokens": 1000000, "memory_fraction": 0.85, "prefix_cache": True},
            },
            {
                "name": "large",
                "device": "cuda",
                "model": "/var/lib/scalellm/models/mixtral-8x7b",
                "tensorParallel": 4,
                "settings": {"model_name": "mixtral", "expert_parallel": 2},
            },
        ],
    },
    "over hosts": {
        **SECURE,
        "executors": [
            {"name": "cpu"},
            {"name": "huge", "device": "cuda", "tensorParallel": 16, "nodes": 2, "replicas": 3},
        ],
    },
    "over hosts by LeaderWorkerSets": {
        **SECURE,
        "executorDefaults": {"groupKind": "LeaderWorkerSet", "maxSurge": 0, "maxUnavailable": 1},
        "executors": [
            {"name": "cpu"},
            {"name": "huge", "device": "cuda", "tensorParallel": 16, "nodes": 2, "replicas": 3},
            {"name": "more", "device": "cuda", "tensorParallel": 4, "nodes": 4, "autoscaling": SCALED},
        ],
    },
    "scaled": {"executors": [{"name": "cpu", "autoscaling": SCALED}], "scheduler": {"replicas": 3}},
    "scaled and secure": {
        **SECURE,
        "executors": [{"name": "cpu", "autoscaling": SCALED}, {"name": "spare"}],
        "monitoring": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    },
    "a Redis of one's own": {
        "redis": {"url": "redis+sentinel://a:26379,b:26379/main/0", "externalPorts": [26379, 6379]},
        "monitoring": {"serviceMonitor": {"enabled": True}},
    },
    "an address of Redis from a Secret": {
        "redis": {"urlSecret": {"name": "redis", "key": "url"}},
        "tokenizer": {"env": [{"name": "OTEL_SERVICE_NAME", "value": "edge"}], "settings": {"log_format": "json"}},
        "models": {"env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]},
    },
    "one of each and nothing else": {
        "fullnameOverride": "llm",
        "image": {"registry": "registry.example/", "tag": "1.2.3", "pullSecrets": [{"name": "pull"}]},
        "tokenizer": {"replicas": 1, "autoscaling": {"enabled": False}, "preStopSeconds": 0, "drainLimitSeconds": 5},
        "scheduler": {"replicas": 1, "drainLimitSeconds": 600},
        "redis": {"persistence": {"enabled": False}},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudgets": {"enabled": False},
    },
}
NEW_ENOUGH = {"over hosts": "1.28.0"}
"""Versions of Kubernetes that sets of values take, where those are not the oldest."""

POD_INDEX = "apps.kubernetes.io/pod-index"
WORKER_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"
"""Labels of a pod with its number in its group, of a StatefulSet and of a LeaderWorkerSet."""

TOLD = {str({"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}): "1" for label in (POD_INDEX, WORKER_INDEX)}
"""Values of variables that the cluster fills in."""


@cache
def rendered(name: str, kubernetes: str = "1.37.0") -> list[Manifest]:
    return render(VALUES[name], kubernetes)


def environment(container: Manifest) -> dict[str, Any]:
    """Variables by name; fails for one that is given twice."""
    names = [entry["name"] for entry in container["env"]]
    assert len(names) == len(set(names))
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
