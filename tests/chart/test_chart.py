"""The chart with twelve sets of values: what Kubernetes' own schemas say, and what every pod must have."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from chart_values import NEW_ENOUGH, POD_INDEX, TOLD, VALUES, WORKER_INDEX, environment, rendered
from helm_chart import CHART, ROOT, Manifest, component, of_kind, pod_template, refusal, render, run_helm, workloads
from scalellm.services.common.health import LIVENESS
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.tokenizer.aliases import read_aliases
from scalellm.services.tokenizer.config import TokenizerSettings

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="NOT tested: run `make setup-dev`")

FOREIGN = {
    "ScaledObject": "keda.sh/v1alpha1",
    "TriggerAuthentication": "keda.sh/v1alpha1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
}
SETTINGS = {"tokenizer": TokenizerSettings, "scheduler": SchedulerSettings, "executor": ExecutorSettings}
LEADER_WORKER_SET = json.loads((ROOT / "tests" / "support" / "leaderworkerset.schema.json").read_text())
PORTS = {"tokenizer": 50051, "scheduler": 50052, "executor": 50061, "redis": 6379}

every_set = pytest.mark.parametrize("name", VALUES)


@pytest.fixture(scope="module", autouse=True)
def _schemas_are_read_once() -> Iterator[None]:
    """The definitions of a version are megabytes, and would be read for every object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
        yield


@every_set
@pytest.mark.parametrize("kubernetes", ["1.25.0", "1.37.0"])
def test_the_api_takes_every_object(name: str, kubernetes: str) -> None:
    version = max(kubernetes, NEW_ENOUGH.get(name, kubernetes))
    for manifest in rendered(name, version):
        if manifest["kind"] in FOREIGN:
            assert manifest["apiVersion"] == FOREIGN[manifest["kind"]]
        elif manifest["kind"] == "LeaderWorkerSet":
            assert manifest["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
            jsonschema.validate(manifest, LEADER_WORKER_SET)
            template = {"apiVersion": "v1", "kind": "PodTemplate", "template": pod_template(manifest)}
            kubernetes_validate.validate(template, version, strict=True)
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


@every_set
def test_helm_finds_nothing_to_complain_of(name: str) -> None:
    done = run_helm("lint", "--strict", str(CHART), values=VALUES[name])
    assert done.returncode == 0, done.stdout


@every_set
def test_every_pod_can_do_little_and_is_bounded(name: str) -> None:
    for workload in workloads(rendered(name)).values():
        pod = pod_template(workload)["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
            assert mounts <= {volume["name"] for volume in pod.get("volumes", ())} | claims


@every_set
def test_a_pod_is_killed_only_after_its_drain_limit(name: str) -> None:
    for workload in workloads(rendered(name)).values():
        pod = pod_template(workload)["spec"]
        (container,) = pod["containers"]
        if component(workload) != "redis":
            limit = float(environment(container)[f"SCALELLM_{component(workload).upper()}_DRAIN_LIMIT_S"])
            pause = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
            assert pause[0] == "sleep"
            assert pod["terminationGracePeriodSeconds"] == float(pause[1]) + limit + 15


@every_set
def test_selectors_find_exactly_their_pods(name: str) -> None:
    manifests = rendered(name)
    labels = {each: pod_template(load)["metadata"]["labels"] for each, load in workloads(manifests).items()}

    def found(selector: dict[str, str]) -> set[str]:
        # The number of a pod within its group is a label that the cluster gives.
        wanted = {key: value for key, value in selector.items() if key not in (POD_INDEX, WORKER_INDEX)}
        return {each for each, own in labels.items() if wanted.items() <= own.items()}

    for each, workload in workloads(manifests).items():
        # A LeaderWorkerSet knows its pods by labels of its own; those that are given are to tell them from others.
        selector = workload["spec"].get("selector", {"matchLabels": labels[each]})
        assert found(selector["matchLabels"]) == {each}
    for each, service in of_kind(manifests, "Service").items():
        targets = found(service["spec"]["selector"])
        assert targets, each
        for target in targets:
            (container,) = pod_template(workloads(manifests)[target])["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            # Equal numbers: what is found by DNS alone is called at the pod's port.
            assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])
    budgets = of_kind(manifests, "PodDisruptionBudget")
    for each, budget in budgets.items():
        targets = found(budget["spec"]["selector"]["matchLabels"])
        assert len({labels[target].get("scalellm/pool", target) for target in targets}) == 1, each
    policies = of_kind(manifests, "NetworkPolicy")
    covered = set[str]().union(*(found(policy["spec"]["podSelector"]["matchLabels"]) for policy in policies.values()))
    assert covered == (set(labels) if policies else set())


@every_set
def test_the_services_know_every_setting_and_one_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of each container, read by the settings of the very service."""
    manifests = rendered(name)
    services = of_kind(manifests, "Service")
    for variable in [one for one in os.environ if one.startswith("SCALELLM_")]:
        monkeypatch.delenv(variable)
    for each, workload in workloads(manifests).items():
        service = component(workload)
        if service == "redis":
            continue
        (container,) = pod_template(workload)["spec"]["containers"]
        variables = environment(container)
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                given = value if isinstance(value, str) else TOLD.get(str(value), FROM_A_SECRET)
                patch.setenv(variable, given.replace("$(LWS_LEADER_ADDRESS)", "sets-0.sets.space"))
            known = {f"SCALELLM_{service.upper()}_{field.upper()}" for field in SETTINGS[service].model_fields}
            assert {one for one in variables if one.startswith("SCALELLM_")} <= known | HEALTH, each
            settings = SETTINGS[service](_cli_parse_args=[])
        dialled = {"tokenizer": "scheduler", "scheduler": "executors"}.get(service)
        addresses = getattr(settings, dialled).split(",") if dialled else []
        for address in addresses:
            host, _, port = address.partition(":")
            # Also those that are not ready: executors load their model, schedulers wait for an executor.
            assert services[host]["spec"]["publishNotReadyAddresses"] is True
            assert [int(port)] == [entry["port"] for entry in services[host]["spec"]["ports"]]
        if service == "scheduler":
            assert len(addresses) == len(pools(manifests))
        url = getattr(settings, "redis_url", None)
        if url is not None and url.startswith("redis://") and "from-a-secret" not in url:
            host = url.removeprefix("redis://").partition(":")[0]
            assert services[host]["spec"]["publishNotReadyAddresses"] is True  # also where a probe was too slow for it


def pools(manifests: list[Manifest]) -> set[str]:
    """Pools that have executors."""
    executors = (load for load in workloads(manifests).values() if component(load) == "executor")
    return {load["metadata"]["labels"]["scalellm/pool"] for load in executors}


FROM_A_SECRET = "redis://from-a-secret:6379/0"
HEALTH = {f"SCALELLM_HEALTH_TLS_{name}" for name in ("CA", "CERT", "KEY", "NAME")}


@pytest.mark.parametrize(("name", "kubernetes"), [("defaults", "1.37.0"), ("defaults", "1.20.2"), ("secure", "1.37.0")])
def test_probes_ask_the_health_service(name: str, kubernetes: str) -> None:
    script = re.search(r'CMD \["python", "-IS", "(\S+)"', (ROOT / "deploy/images/scheduler.Dockerfile").read_text())
    assert script is not None
    for workload in workloads(rendered(name, kubernetes)).values():
        (container,) = pod_template(workload)["spec"]["containers"]
        if (service := component(workload)) == "redis":
            continue
        port = PORTS[service]
        if kubernetes == "1.37.0" and name == "defaults":
            alive, ready = {"grpc": {"port": port, "service": LIVENESS}}, {"grpc": {"port": port}}
        else:
            command = ["python", "-IS", script[1], f"127.0.0.1:{port}"]
            alive, ready = {"exec": {"command": [*command, LIVENESS]}}, {"exec": {"command": command}}
        assert alive.items() <= container["livenessProbe"].items()
        assert alive.items() <= container["startupProbe"].items()
        assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] == 600
        assert ready.items() <= container["readinessProbe"].items()


@every_set
def test_a_release_that_never_was_ready_can_be_upgraded(name: str) -> None:
    """A StatefulSet that starts pods in order waits for the broken one for ever: a known limitation of Kubernetes."""
    for workload in of_kind(rendered(name), "StatefulSet").values():
        assert workload["spec"]["podManagementPolicy"] == "Parallel"


def test_old_kubernetes_gets_old_versions_of_the_api() -> None:
    versions = {manifest["kind"]: manifest["apiVersion"] for manifest in rendered("defaults", "1.20.2")}
    assert versions["PodDisruptionBudget"] == "policy/v1beta1"
    assert versions["HorizontalPodAutoscaler"] == "autoscaling/v2beta2"


def test_files_that_secured_services_read_are_those_that_the_script_makes(tmp_path: Path) -> None:
    variables = {**os.environ, "SCALELLM_SECRETS": str(tmp_path), "SCALELLM_LINE": "line-scalellm.space"}
    subprocess.run([ROOT / "scripts" / "secrets"], env=variables, check=True, capture_output=True, timeout=120)
    manifests = rendered("clients with certificates")
    for workload in workloads(manifests).values():
        service = component(workload)
        pod = pod_template(workload)["spec"]
        (container,) = pod["containers"]
        said = [str(value) for value in environment(container).values()] if "env" in container else []
        named = {
            word.removeprefix("/run/secrets/")
            for word in [*said, *container.get("command", ())]
            if word.startswith("/run/secrets/")
        }
        assert named
        assert {file for file in named if not (tmp_path / service / file).exists()} == set()
        (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
        assert secret["secretName"] == f"line-scalellm-{service}"
    # Names by which services reach one another are in the certificates, as TLS compares them.
    (scaled,) = of_kind(rendered("scaled and secure"), "ScaledObject").values()
    host = scaled["spec"]["triggers"][0]["metadata"]["scalerAddress"].partition(":")[0]
    for file, name in (
        (tmp_path / "scheduler" / "inner.pem", host),
        (tmp_path / "redis" / "inner.pem", "line-scalellm-redis"),
    ):
        command = ["openssl", "x509", "-in", str(file), "-noout", "-checkhost", name]
        assert "does match" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for service in ("tokenizer", "scheduler"):
        assert "@line-scalellm-redis:6379/0" in (tmp_path / f"{service}.env").read_text()


def test_keda_asks_each_scheduler_for_the_pool_by_its_name() -> None:
    manifests = rendered("scaled and secure")
    (scaled,) = of_kind(manifests, "ScaledObject").values()
    pool = scaled["spec"]["scaleTargetRef"]["name"]
    assert "replicas" not in workloads(manifests)[pool]["spec"]
    assert workloads(manifests)["line-scalellm-executor-spare"]["spec"]["replicas"] == 1
    assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == (0, 9)
    (container,) = pod_template(workloads(manifests)["line-scalellm-scheduler"])["spec"]["containers"]
    executors = environment(container)["SCALELLM_SCHEDULER_EXECUTORS"].split(",")
    for number, trigger in enumerate(scaled["spec"]["triggers"]):
        assert trigger["metadata"]["executors"] in executors
        scheduler = "line-scalellm-scheduler"
        assert trigger["metadata"]["scalerAddress"] == f"{scheduler}-{number}.{scheduler}.space.svc:50052"
        assert trigger["authenticationRef"]["name"] in of_kind(manifests, "TriggerAuthentication")
    assert len(scaled["spec"]["triggers"]) == 2
    keda = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "keda"}}}
    rules = of_kind(manifests, "NetworkPolicy")["line-scalellm-scheduler"]["spec"]["ingress"]
    assert any(keda in rule["from"] for rule in rules if rule["ports"][0]["port"] == 50052)


@pytest.mark.parametrize("service", ["tokenizer", "scheduler"])
def test_pods_are_ready_without_an_executor_only_where_all_pools_may_be_empty(service: str) -> None:
    for name, awaits in (("scaled", False), ("scaled and secure", True), ("defaults", True)):
        (pod,) = (load for load in workloads(rendered(name)).values() if component(load) == service)
        probe = pod_template(pod)["spec"]["containers"][0]["readinessProbe"]
        assert ("tcpSocket" not in probe) == awaits


def test_a_pool_of_gpus_has_them_and_its_own_volumes() -> None:
    pod = pod_template(workloads(rendered("pools"))["line-scalellm-executor-gpu"])["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "scalellm/executor-gpu:0.1.0"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1, "memory": "8Gi"}
    sources = {volume["name"]: set(volume) - {"name"} for volume in pod["volumes"]}
    assert sources["models"] == sources["kernels"] == {"hostPath"}
    assert "initContainers" not in pod
    assert environment(container)["SCALELLM_EXECUTOR_MAX_NUM_BATCHED_TOKENS"] == "1000000"
    assert environment(container)["SCALELLM_EXECUTOR_MEMORY_FRACTION"] == "0.85"
    assert environment(container)["SCALELLM_EXECUTOR_PREFIX_CACHE"] == "true"


def test_several_models_are_served_by_the_names_that_their_executors_have() -> None:
    loads = workloads(rendered("pools"))
    (container,) = pod_template(loads["line-scalellm-tokenizer"])["spec"]["containers"]
    served = TokenizerSettings(
        _cli_parse_args=[], model=environment(container)["SCALELLM_TOKENIZER_MODEL"]
    ).served_models
    names = set()
    for load in loads.values():
        if component(load) == "executor":
            (executor,) = pod_template(load)["spec"]["containers"]
            told = environment(executor)
            path = told["SCALELLM_EXECUTOR_MODEL"]
            names.add((told.get("SCALELLM_EXECUTOR_MODEL_NAME", path), path))
    # By its path a model is told to both services where no name is given: each takes the name from there.
    assert {(model.name, model.source) for model in served} == names
    assert served[0].source == "/var/lib/scalellm/models/llama"  # of requests that name none


def test_the_tokenizer_reads_the_aliases_that_are_given(tmp_path: Path) -> None:
    (container,) = pod_template(workloads(rendered("pools"))["line-scalellm-tokenizer"])["spec"]["containers"]
    settings = TokenizerSettings(
        _cli_parse_args=[],
        model=environment(container)["SCALELLM_TOKENIZER_MODEL"],
        aliases=environment(container)["SCALELLM_TOKENIZER_ALIASES"],
    )
    assert settings.aliases is not None
    assert str(settings.aliases.parent) in [mount["mountPath"] for mount in container["volumeMounts"]]
    config = of_kind(rendered("pools"), "ConfigMap")["line-scalellm-tokenizer-aliases"]
    file = tmp_path / settings.aliases.name
    file.write_text(config["data"][file.name])
    found = read_aliases(file, [model.name for model in settings.served_models])
    assert {name: alias.main for name, alias in found.items()} == {
        "chat": "/var/lib/scalellm/models/llama",
        "gpt-4.1": "mixtral",
    }
    assert not of_kind(rendered("defaults"), "ConfigMap")


def test_every_model_is_fetched_for_the_tokenizer_and_an_executor_s_own_for_it() -> None:
    pools = [{"name": "a", "model": "org/other"}, {"name": "b"}, {"name": "c"}]
    loads = workloads(render({"executors": pools}))
    fetched = {
        name: [container["command"][-1] for container in pod_template(load)["spec"].get("initContainers", ())]
        for name, load in loads.items()
    }
    assert fetched["line-scalellm-tokenizer"] == ["smollm2-135m-instruct", "org/other"]
    assert fetched["line-scalellm-executor-a"] == ["org/other"]
    assert fetched["line-scalellm-executor-b"] == ["smollm2-135m-instruct"]


def test_an_executor_of_several_gpus_has_them_and_memory_to_share() -> None:
    pod = pod_template(workloads(rendered("pools"))["line-scalellm-executor-large"])["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert environment(container)["SCALELLM_EXECUTOR_TENSOR_PARALLEL"] == "4"
    (shared,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == shared]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tokeniser": {}}, "tokeniser"),
        ({"executors": []}, "executors"),
        ({"executors": [{"name": "a", "nodes": 0}]}, "nodes"),
        ({"executors": [{"name": "a", "nodes": 2}]}, "pool a: nodes: 2 does not divide tensorParallel, 1"),
        ({"executors": [{"name": "a", "nodes": 2, "tensorParallel": 2}]}, "security.enabled has to be true"),
        ({"executors": [{"name": "a", "settings": {"nodes": 2}}]}, "/settings/nodes"),
        ({"executors": [{"name": "a", "groupKind": "Deployment"}]}, "groupKind"),
        ({"executors": [{"name": "a", "tensorParallel": 0}]}, "tensorParallel"),
        ({"executors": [{"name": "a", "settings": {"tensor_parallel": 2}}]}, "/settings/tensor_parallel"),
        ({"executors": [{"name": "a", "device": "tpu"}]}, "device"),
        ({"executors": [{"replicas": 1}]}, "name"),
        ({"executors": [{"name": "Large"}]}, "name"),
        ({"executors": [{"name": "a"}, {"name": "a"}]}, "two pools have the name a"),
        ({"executors": [{"name": "a", "model": "other"}]}, "model: no pool of executors runs smollm2-135m-instruct"),
        ({"executors": [{"name": "a", "maxSurge": 0}]}, "pool a: maxSurge"),
        ({"executors": [{"name": "a", "settings": {"port": 1}}]}, "/settings/port"),
        ({"executors": [{"name": "a", "autoscaling": {"enabled": True, "minReplicas": 5}}]}, "pool a: autoscaling"),
        ({"scheduler": {"replicas": 0}}, "replicas"),
        ({"tokenizer": {"drainLimitSeconds": 3601}}, "drainLimitSeconds"),
        ({"tokenizer": {"aliases": {"chat": {"small": 0}}}}, "/aliases/chat/small"),
        ({"tokenizer": {"aliases": {f"chat-{n}": {"small": 1} for n in range(65)}}}, "/tokenizer/aliases"),
        ({"redis": {"url": "http://redis"}}, "url"),
        ({"redis": {"urlSecret": {"name": "redis"}}}, "key"),
        ({"models": {"volume": {"emptyDir": {}, "hostPath": {"path": "/m"}}}}, "volume"),
        ({"executorDefaults": {"name": "a"}}, "executorDefaults"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    assert named in refusal(values)
