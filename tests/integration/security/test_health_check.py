"""A container's health check against a service in plaintext, a service with mutual TLS, and no service."""

from __future__ import annotations

import pytest
import trustme

from certificates import issue
from scalellm.services.common.health_check import main
from service_processes import Spawn


def test_serving_only_to_whom_the_service_knows(spawn: Spawn, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    service = issue(tmp_path / "service", trustme.CA(), "scheduler.internal")
    open_one = spawn("scheduler", "--executor-grace-s", "0")  # healthy only with an executor: it answers, and says no
    closed = spawn("scheduler", "--executor-grace-s", "0", *service.flags(mutual=True))
    known = {f"SCALELLM_HEALTH_TLS_{name.upper()}": str(getattr(service, name)) for name in ("cert", "key", "ca")}
    named = {**known, "SCALELLM_HEALTH_TLS_NAME": "scheduler.internal"}
    said = {}
    for case, address, environment in (
        ("plaintext", open_one.address, {}),
        ("mutual", closed.address, named),
        ("unnamed", closed.address, known),
        ("unknown", closed.address, {}),
        ("wrong file", closed.address, {"SCALELLM_HEALTH_TLS_CA": "/none"}),
    ):
        assert main(address, environment) == 1
        said[case] = capsys.readouterr().out.strip().removeprefix(f"{address}: ")
    assert said.pop("wrong file").endswith("cannot read /none: No such file or directory")
    assert said == {
        "plaintext": "not serving",
        "mutual": "not serving",
        "unnamed": "unreachable",
        "unknown": "unreachable",
    }
