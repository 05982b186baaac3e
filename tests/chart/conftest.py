"""Tests of the chart need helm."""

from __future__ import annotations

import pytest

from helm_chart import find_helm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.path.is_relative_to(__file__.rpartition("/")[0])]
    if mine and find_helm() is None:
        for item in mine:
            item.add_marker(pytest.mark.skip(reason="the chart is NOT tested: no command helm; try `make test-chart`"))
