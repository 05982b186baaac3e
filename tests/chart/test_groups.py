"""Executors over several hosts in the chart: the groups of pods, and how they find one another."""

from __future__ import annotations

from chart_values import POD_INDEX, SCALED, SECURE, TOLD, VALUES, WORKER_INDEX, environment, rendered
from helm_chart import component, of_kind, pod_template, refusal, render, workloads


def test_an_executor_over_hosts_is_a_group_of_pods_that_find_their_first() -> None:
    manifests = rendered("over hosts")
    services = of_kind(manifests, "Service")
    groups = {name: load for name, load in workloads(manifests).items() if "-huge-" in name}
    assert set(groups) == {f"line-scalellm-executor-huge-{number}" for number in range(3)}
    for name, group in groups.items():
        spec = group["spec"]
        assert (group["kind"], spec["replicas"], spec["podManagementPolicy"]) == ("StatefulSet", 2, "Parallel")
        (container,) = pod_template(group)["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        variables = environment(container)
        assert (variables["SCALELLM_EXECUTOR_TENSOR_PARALLEL"], variables["SCALELLM_EXECUTOR_NODES"]) == ("16", "2")
        assert str(variables["SCALELLM_EXECUTOR_NODE_RANK"]) in TOLD
        assert variables["SCALELLM_EXECUTOR_LEADER"] == f"{name}-0.{spec['serviceName']}.space.svc:50071"
        assert variables["SCALELLM_EXECUTOR_LINK_TOKEN_FILE"]
        nodes = services[spec["serviceName"]]["spec"]
        assert (nodes["clusterIP"], nodes["publishNotReadyAddresses"]) == ("None", True)
    # The schedulers are told of node 0 of each group alone.
    assert services["line-scalellm-executor-huge"]["spec"]["selector"][POD_INDEX] == "0"
    executor = {"app.kubernetes.io/component": "executor"}
    policy = of_kind(manifests, "NetworkPolicy")["line-scalellm-executor"]["spec"]
    for rules, peers in ((policy["ingress"], "from"), (policy["egress"], "to")):
        open_to = [rule[peers] for rule in rules if peers in rule and "ports" not in rule]
        assert [executor.items() <= peer["podSelector"]["matchLabels"].items() for (peer,) in open_to] == [True]
    others = of_kind(rendered("secure"), "NetworkPolicy")["line-scalellm-executor"]["spec"]
    assert all("ports" in rule for rule in [*others["ingress"], *others["egress"]])


def test_a_leader_worker_set_has_the_groups_of_a_pool() -> None:
    manifests = rendered("over hosts by LeaderWorkerSets")
    services = of_kind(manifests, "Service")
    sets = of_kind(manifests, "LeaderWorkerSet")
    for pool, groups, size in (("huge", 3, 2), ("more", None, 4)):
        name = f"line-scalellm-executor-{pool}"
        # The set's controller makes a Service by the name of the set.
        one = sets[f"{name}-lws"]
        assert one["metadata"]["name"] not in services
        assert (one["spec"].get("replicas"), one["spec"]["leaderWorkerTemplate"]["size"]) == (groups, size)
        (container,) = pod_template(one)["spec"]["containers"]
        variables = environment(container)
        assert str(variables["SCALELLM_EXECUTOR_NODE_RANK"]) in TOLD
        assert WORKER_INDEX in str(variables["SCALELLM_EXECUTOR_NODE_RANK"])
        assert variables["SCALELLM_EXECUTOR_LEADER"] == "$(LWS_LEADER_ADDRESS).svc:50071"
        assert variables["SCALELLM_EXECUTOR_NODES"] == str(size)
        # All pods of a group are replaced at once, so a rollout may wait for the model.
        assert "tcpSocket" not in container["readinessProbe"]
        assert services[name]["spec"]["selector"][WORKER_INDEX] == "0"
    assert not any("-huge" in name or "-more" in name for name in of_kind(manifests, "StatefulSet"))
    (scaled,) = of_kind(manifests, "ScaledObject").values()
    reference = scaled["spec"]["scaleTargetRef"]
    target = sets[reference["name"]]
    assert (reference["apiVersion"], reference["kind"]) == (target["apiVersion"], target["kind"])


def test_groups_are_leader_worker_sets_where_the_cluster_has_these() -> None:
    def kinds(**pool: str) -> set[str]:
        executors = [{**VALUES["over hosts"]["executors"][1], **pool}]
        manifests = render(
            VALUES["over hosts"] | {"executors": executors}, apis=["leaderworkerset.x-k8s.io/v1/LeaderWorkerSet"]
        )
        return {load["kind"] for load in workloads(manifests).values() if component(load) == "executor"}

    assert kinds() == {"LeaderWorkerSet"}
    assert kinds(groupKind="StatefulSet") == {"StatefulSet"}


def test_an_executor_over_hosts_takes_a_new_kubernetes() -> None:
    said = refusal(VALUES["over hosts"], "1.27.0")
    assert "pool huge: nodes: above 1 takes Kubernetes 1.28" in said


def test_groups_of_stateful_sets_have_no_autoscaling() -> None:
    pool = {"name": "huge", "tensorParallel": 2, "nodes": 2, "autoscaling": SCALED}
    assert "pool huge: autoscaling" in refusal({**SECURE, "executors": [pool]})


def test_names_of_groups_are_as_short_as_kubernetes_needs_them() -> None:
    pool = {"name": "a" * 20, "tensorParallel": 2, "nodes": 2}
    values = {**SECURE, "executors": [pool], "fullnameOverride": "b" * 20}
    longest = [name for name in workloads(render(values)) if "-executor-" in name]
    assert max(map(len, longest)) == 52
    for kind, length in (("StatefulSet", 53), ("LeaderWorkerSet", 57)):
        said = refusal({**values, "executors": [{**pool, "groupKind": kind}], "fullnameOverride": "b" * 21})
        assert f"{length} characters, Kubernetes takes 52" in said
