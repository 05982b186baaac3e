"""The chart on a real API server, whose nodes only pretend to run containers: what the API takes, and where pods go.

The tests share one release and run in this order.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chart_release import COMPONENTS, RELEASE, ChartRelease
from kube_cluster import HOLLOW, KubeCluster, until

NAMESPACE = "scalellm-test-nodes"


@pytest.fixture(scope="module")
def empty(cluster: KubeCluster) -> Iterator[set[str]]:
    """The objects that are in the namespace before anything is installed."""
    with cluster.namespace(NAMESPACE) as objects:
        yield objects


@pytest.fixture(scope="module")
def release(cluster: KubeCluster, empty: set[str], stage) -> ChartRelease:
    """The chart's own values, but for what such nodes cannot do, and for room on a small machine."""
    small = {
        "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "4Gi"}},
        "nodeSelector": HOLLOW,
    }
    values = {
        "models": {"pull": False},  # init containers do not end
        "tokenizer": small,
        "scheduler": small,
        "executors": [{"name": "cpu", "replicas": 2}],
        "executorDefaults": small,
        "redis": {**small, "persistence": {"enabled": False}},
    }
    release = ChartRelease(cluster, NAMESPACE, values)
    with stage("install with --wait"):
        release.upgrade("1")
    return release


def test_all_pods_are_ready_and_autoscaling_holds_its_least(release: ChartRelease) -> None:
    """Also without metrics, which an autoscaler of a cluster without a metrics server has to do without."""
    counts = {"tokenizer": 2, "scheduler": 2, "executor": 2, "redis": 1}
    until(lambda: release.ready() == counts, "all pods ready")


def test_executors_are_scaled_from_one_to_three_and_back(release: ChartRelease, stage) -> None:
    for count in (1, 3, 1, 2):
        with stage(f"executors scaled to {count}"):
            release.scale_executors(count)
            until(lambda count=count: release.ready()["executor"] == count, f"{count} executors")


def test_upgrade_and_rollback_replace_every_pod(release: ChartRelease, stage) -> None:
    with stage("helm upgrade --wait to another tag"):
        release.upgrade("2")
    assert release.tags() == {"2"}
    with stage("helm rollback --wait"):
        release.roll_back()
    assert release.tags() == {"1"}


def test_a_release_whose_images_were_wrong_is_upgraded(release: ChartRelease, stage) -> None:
    """Without a hand on it: no pod is left waiting for the broken one before it."""
    release.install(image={"tag": "3", "pullPolicy": "Never"})
    until(lambda: "3" in release.tags(), "a pod of the wrong release")
    with stage("helm upgrade --wait from images that are not there"):
        release.upgrade("4")
    assert release.tags() == {"4"}


@pytest.mark.parametrize("component", ["executor", "scheduler", "tokenizer"])
def test_evictions_take_one_pod_of_a_kind_at_a_time(release: ChartRelease, component: str) -> None:
    until(lambda: release.ready()[component] == 2, "two pods")
    first, second = release.pods(component)
    assert release.evict(first) == ""
    assert "disruption budget" in release.evict(second)
    until(lambda: release.evict(second) == "", "the first one replaced")
    until(lambda: release.ready()[component] == 2, "two pods")
    assert not {pod.uid for pod in release.pods(component)} & {first.uid, second.uid}


def test_nodes_are_drained_within_the_disruption_budgets(release: ChartRelease, cluster: KubeCluster, stage) -> None:
    before = release.ready()
    told = []
    for node in cluster.nodes(HOLLOW):
        with stage(f"drain of {node}, and all is ready again"):
            told.append(cluster.drain(node))
            until(lambda: release.ready() == before, "all pods ready again")
        assert node not in {pod.node for component in COMPONENTS for pod in release.pods(component)}
        cluster.kubectl("uncordon", node)
    # All pods had gone to the second node, so that two of a kind would have left at once.
    assert "disruption budget" in told[1]


def test_uninstall_leaves_nothing(release: ChartRelease, cluster: KubeCluster, empty: set[str], stage) -> None:
    with stage("uninstall: no object left"):
        cluster.uninstall(RELEASE, NAMESPACE)
        until(lambda: cluster.inventory(NAMESPACE) == empty, "the end of all objects")


def test_the_claim_of_redis_is_what_an_operator_removes(cluster: KubeCluster, empty: set[str]) -> None:
    """By the command in docs/operations/kubernetes.md."""
    cluster.install(RELEASE, NAMESPACE, {})
    until(lambda: cluster.inventory(NAMESPACE) > {*empty, CLAIM}, "the claim")
    cluster.uninstall(RELEASE, NAMESPACE)
    until(lambda: cluster.inventory(NAMESPACE) == {*empty, CLAIM}, "the end of all but the claim")
    cluster.kubectl("delete", "pvc", "-n", NAMESPACE, "-l", f"app.kubernetes.io/instance={RELEASE}")
    until(lambda: cluster.inventory(NAMESPACE) == empty, "the end of the claim")


CLAIM = f"persistentvolumeclaim/data-{RELEASE}-scalellm-redis-0"
