"""The chart with real containers, used from outside the cluster while it is scaled, upgraded, drained and broken.

Streams are those of `fault_workload`, on the executors' fake engine; each one's tokens are compared with those of an
undisturbed run. The tests share one release and run in this order.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from chart_release import RELEASE, ChartRelease, Pod
from cluster_line import ClusterLine, Doors
from compose_stack import SERVICES, ComposeStack, docker, why_no_docker
from fault_load import load
from fault_promises import Fault
from fault_trials import HEADINGS, Tally, Trials
from fault_workload import Workload
from helm_chart import Manifest, of_kind, render
from keda_calls import Keda
from kube_cluster import LIMIT, REAL, KubeCluster, until
from scalellm.client import Client
from scalellm.v1 import common_pb2, generation_pb2
from told_at_end import lines_at_end

NAMESPACE = "scalellm-test-real"
MODEL = "smollm2-135m-instruct"
COUNTS = {"tokenizer": 2, "scheduler": 2, "executor": 2, "redis": 1}
FAKE = {"engine": "fake", "fake_preset": "h200-llama-8b", "max_model_len": 4096, "num_blocks": 2048}
SEED = int(os.environ.get("FAULTS_SEED") or 0)
CLAIM = f"data-{RELEASE}-scalellm-redis-0"
USER = 10001
"""The user as whom the chart's containers run."""


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Rows about streams, to print at the end."""
    rows = lines_at_end(request.config, "streams")
    rows.append(HEADINGS)
    return rows


@pytest.fixture(scope="module")
def tags(cluster: KubeCluster, stage) -> Iterator[list[str]]:
    """Two tags of the same images, which are on the real node."""
    if reason := why_no_docker():
        pytest.skip(f"needs Docker with Compose v2: {reason}")
    with stage("the real node starts"):
        cluster.add_real_node()
    stack = ComposeStack()
    images: dict[str, list[str]] = {}
    try:
        with stage("images are built"):
            stack.compose("build", timeout=1500)
        images[stack.tag] = built = [stack.image(service) for service in SERVICES]
        stack.new_release()
        images[stack.tag] = [stack.image(service) for service in SERVICES]
        for old, new in zip(built, images[stack.tag], strict=True):
            docker("tag", old, new)
        with stage("images are brought to the node"):
            cluster.load(*built, *images[stack.tag])
        yield list(images)
    finally:
        cluster.docker("image", "rm", "--force", *(image for both in images.values() for image in both))
        stack.remove_images()


def volume(folder: Path) -> Manifest:
    """A volume in a folder of this machine, for the claim of Redis: the cluster has nothing that makes volumes."""
    spec = {
        "capacity": {"storage": "2Gi"},
        "accessModes": ["ReadWriteOnce"],
        "claimRef": {"namespace": NAMESPACE, "name": CLAIM},
        "hostPath": {"path": str(folder), "type": "Directory"},
    }
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": NAMESPACE}, "spec": spec}


@pytest.fixture(scope="module")
def empty(cluster: KubeCluster, tags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """The objects that are in the namespace before anything is installed."""
    folder = tmp_path_factory.mktemp("redis")
    os.chown(folder, USER, USER)
    with cluster.applied(volume(folder)), cluster.namespace(NAMESPACE) as objects:
        yield objects


@pytest.fixture(scope="module")
def release(cluster: KubeCluster, empty: set[str], tags: list[str], model_dir, stage) -> ChartRelease:
    """The chart's own values, but for room on a small machine and a model that is there."""
    small = {"resources": {"requests": {"cpu": "20m", "memory": "64Mi"}}, "nodeSelector": REAL}
    values = {
        "models": {"pull": False, "volume": {"hostPath": {"path": str(model_dir(MODEL).parent), "type": "Directory"}}},
        "tokenizer": small,
        "scheduler": small,
        "executorDefaults": small,
        "redis": small,
    }
    release = ChartRelease(cluster, NAMESPACE, values)
    with stage("install with --wait, the real model"):
        release.upgrade(tags[0])
    return release


@pytest.fixture(scope="module")
def doors(release: ChartRelease) -> Iterator[Doors]:
    with Doors(release) as doors:
        yield doors


@pytest.fixture(scope="module")
def line(release: ChartRelease, doors: Doors, tags: list[str], stage) -> ClusterLine:
    """Two executors with the fake engine."""
    release.values["executorDefaults"] = {**release.values["executorDefaults"], "settings": FAKE, "replicas": 2}
    with stage("helm upgrade --wait to other executors"):
        release.upgrade(tags[0])
    return ClusterLine(release, doors, COUNTS)


@pytest.fixture(scope="module")
def trials(line: ClusterLine) -> Trials:
    return Trials(line, Workload(SEED, longest=600))


async def scale_as_keda_does(line: ClusterLine, spec: Manifest) -> int:
    """Ask each scheduler that a ScaledObject names, and scale to the highest number within its limits."""
    release = line.release
    schedulers = {service.name: service.address for service in await line.services("scheduler")}
    wanted = spec["minReplicaCount"]
    for trigger in spec["triggers"]:
        pod = trigger["metadata"]["scalerAddress"].partition(".")[0]
        async with grpc.aio.insecure_channel(schedulers[pod]) as channel:
            wanted = max(wanted, int(await Keda(channel, **trigger["metadata"]).wanted()))
    count = min(wanted, spec["maxReplicaCount"])
    await asyncio.to_thread(release.scale_executors, count)
    return count


async def prepared(trials: Trials) -> None:
    await trials.line.wait_linked()
    await trials.prepare()


async def nothing(_: object) -> None:
    """No fault: pods come and go as they are meant to."""


ORDERLY = Fault(nothing)
ORDERLY_WITHOUT_REDIS = Fault(nothing, unsaved=True)
"""Redis comes and goes as well: what a session says meanwhile may not be saved."""


def test_the_real_model_answers_from_outside(doors: Doors) -> None:
    request = generation_pb2.GenerateRequest(
        prompt="The capital of France is", sampling=common_pb2.SamplingParams(max_tokens=6, temperature=0)
    )
    with Client(doors.addresses[0]) as client, client.generate(request, timeout=120) as stream:
        responses = list(stream)
    assert "".join(response.delta.text for response in responses).startswith(" Paris")
    assert responses[-1].finished.usage.completion_tokens == 6


async def test_executors_are_scaled_under_load(
    release: ChartRelease, line: ClusterLine, trials: Trials, figures: list[str], stage
) -> None:
    await prepared(trials)
    async with load(trials, ORDERLY, random.Random(SEED), figures, "executors 2, 1, 3, 1, 2"):
        for count in (1, 3, 1, 2):
            with stage(f"executors scaled to {count}, under load"):
                await asyncio.to_thread(release.scale_executors, count)
                line.counts["executor"] = count
                await line.wait_linked()


async def test_upgrade_replaces_every_pod_under_load(
    release: ChartRelease, tags: list[str], trials: Trials, figures: list[str], stage
) -> None:
    await prepared(trials)
    async with load(trials, ORDERLY_WITHOUT_REDIS, random.Random(SEED), figures, "helm upgrade, all services"):
        with stage("helm upgrade --wait to another tag, under load"):
            await asyncio.to_thread(release.upgrade, tags[1])
    assert release.tags() == {tags[1]}


async def test_a_drain_replaces_every_pod_under_load(
    release: ChartRelease, cluster: KubeCluster, trials: Trials, figures: list[str], stage
) -> None:
    """The node takes pods again at once, in place of the other nodes that a cluster would have."""
    await prepared(trials)
    (node,) = cluster.nodes(REAL)
    before = {pod.uid for component in COUNTS for pod in release.pods(component)}
    async with load(trials, ORDERLY_WITHOUT_REDIS, random.Random(SEED), figures, "drain, all services"):
        with stage("drain of the real node, under load"):
            draining = asyncio.create_task(asyncio.to_thread(cluster.drain, node))
            await asyncio.to_thread(
                until, lambda: draining.done() or cluster.is_cordoned(node), "a node that is drained"
            )
            await asyncio.to_thread(cluster.kubectl, "uncordon", node)
            assert "disruption budget" in await draining
            await trials.line.wait_linked()
    assert not before & {pod.uid for component in COUNTS for pod in release.pods(component)}


WAYS: dict[str, Callable[[ChartRelease, str, Pod], None]] = {
    "crashed": lambda release, component, pod: release.crash(component, pod),
    "deleted at once": lambda release, component, pod: release.delete_at_once(pod),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("component", COUNTS)
async def test_a_pod_is_killed(
    release: ChartRelease, trials: Trials, figures: list[str], component: str, way: str, stage
) -> None:
    rng = random.Random(f"{component} {way} {SEED}")

    async def inject(_: object) -> None:
        victim = rng.choice(await asyncio.to_thread(release.pods, component))
        await asyncio.to_thread(WAYS[way], release, component, victim)

    tally = Tally(f"{component} {way}")
    try:
        await prepared(trials)
        with stage(f"{component} {way}, until all is ready again"):
            fault = Fault(inject, errors=component == "tokenizer", unsaved=component == "redis")  # as in FAULTS
            await trials.run(fault, 0, rng, tally)
    finally:
        figures.append(str(tally))


async def test_executors_follow_the_load_as_keda_has_them(
    release: ChartRelease,
    line: ClusterLine,
    trials: Trials,
    figures: list[str],
    tags: list[str],
    stage,
) -> None:
    """The test plays KEDA: it asks the schedulers by the chart's ScaledObject, and scales the Deployment.

    The object is rendered and not installed: cluster-lab's API server ends when it stores one of a kind of its own.
    """
    pool = {**release.values["executorDefaults"], "settings": {**FAKE, "max_num_seqs": 8}, "replicas": 1}
    scaled = {**pool, "autoscaling": {"enabled": True, "maxReplicas": 3}}
    (scaled_object,) = of_kind(render({**release.values, "executorDefaults": scaled}), "ScaledObject").values()
    release.values["executorDefaults"] = pool
    await asyncio.to_thread(release.upgrade, tags[1])

    async def keda_until(count: int) -> None:
        async with asyncio.timeout(LIMIT):
            while line.counts["executor"] != count:
                line.counts["executor"] = await scale_as_keda_does(line, scaled_object["spec"])
                await asyncio.sleep(1)
        await line.wait_linked()

    line.counts["executor"] = 1
    await prepared(trials)
    async with load(trials, ORDERLY, random.Random(SEED), figures, "executors 1, 3 by KEDA's part"):
        with stage("executors from 1 to 3 by KEDA's part, under load"):
            await keda_until(3)
    with stage("executors from 3 to 1 by KEDA's part, without load"):
        await keda_until(1)


def test_uninstall_leaves_nothing(release: ChartRelease, cluster: KubeCluster, empty: set[str], stage) -> None:
    """By the commands in docs/operations/kubernetes.md."""
    with stage("uninstall: no object left but the claim of Redis"):
        cluster.uninstall(RELEASE, NAMESPACE)
        until(lambda: cluster.inventory(NAMESPACE) == {*empty, f"persistentvolumeclaim/{CLAIM}"}, "the end of all")
    cluster.kubectl("delete", "pvc", "-n", NAMESPACE, "-l", f"app.kubernetes.io/instance={RELEASE}")
    until(lambda: cluster.inventory(NAMESPACE) == empty, "the end of the claim")
    mine = f"label=io.kubernetes.pod.namespace={NAMESPACE}"
    until(lambda: cluster.docker("ps", "-aq", "--filter", mine) == "", "the end of all containers")
