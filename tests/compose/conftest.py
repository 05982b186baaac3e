"""A real Docker engine, where there is one; what the tests measured is printed at the end."""

from __future__ import annotations

import pytest

from compose_stack import why_no_docker
from told_at_end import lines_at_end
from told_at_once import pytest_runtest_makereport as pytest_runtest_makereport


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.path.is_relative_to(__file__.rpartition("/")[0])]
    reason = why_no_docker() if mine else ""
    for item in mine:
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.timeout(1800))
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"needs Docker with Compose v2: {reason}"))


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines to print when all is done."""
    return lines_at_end(request.config, "docker compose")
