"""A Kubernetes, where there is a script that starts one; what each stage took is printed at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from kube_cluster import KubeCluster
from told_at_end import lines_at_end
from told_at_once import pytest_runtest_makereport as pytest_runtest_makereport

Stage = Callable[[str], AbstractContextManager[None]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(3600))
            if not os.environ.get("CLUSTER_LAB"):
                item.add_marker(pytest.mark.skip(reason="needs CLUSTER_LAB, a script that starts a Kubernetes"))


@pytest.fixture(scope="session")
def stage(request: pytest.FixtureRequest) -> Stage:
    """Measure the seconds of what is named, for the table at the end."""
    rows = lines_at_end(request.config, "stages")

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        rows.append(f"{name:60} {time.monotonic() - started:7.1f} s")

    return measured


@pytest.fixture(scope="session")
def cluster(stage: Stage) -> Iterator[KubeCluster]:
    """A control plane and nodes that only pretend to run containers."""
    with ExitStack() as stack:
        with stage("the cluster starts"):
            cluster = stack.enter_context(KubeCluster())
        yield cluster
