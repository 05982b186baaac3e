"""Settings of containers in compose.yaml and beside it: bounds on memory, processes and logs, and pinned images."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SECOND_MODEL = ROOT / "deploy" / "second-model.yaml"
SECURE = ROOT / "deploy" / "secure.yaml"
SECURE_SECOND_MODEL = ROOT / "deploy" / "secure-second-model.yaml"
VARIABLE = re.compile(r"\$\{(SCALELLM_[A-Z_]+):-")
PINNED = re.compile(r"\$\{SCALELLM_[A-Z_]+_IMAGE:-[\w/]+:[\w.-]+@sha256:[0-9a-f]{64}\}")


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_bounded(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"\$\{SCALELLM_MEMORY_[A-Z]+:-\d+g\}", service["mem_limit"])
    assert re.fullmatch(r"\$\{SCALELLM_PIDS:-\d+\}", service["pids_limit"])
    assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}}


def test_the_memory_of_redis_is_bounded_below_its_container() -> None:
    settings = dict(
        line.split(maxsplit=1)
        for line in (ROOT / "deploy" / "images" / "redis.conf").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert (settings["maxmemory"], settings["maxmemory-policy"]) == ("256mb", "volatile-ttl")
    assert SERVICES["redis"]["mem_limit"].endswith(":-1g}")


def test_every_image_that_is_not_built_here_is_named_with_its_digest_and_can_be_another() -> None:
    for name, service in SERVICES.items():
        if service["image"].startswith("scalellm/") and "build" not in service:
            continue  # built for another service
        if "build" not in service:
            assert PINNED.fullmatch(service["image"]), name
            continue
        text = (ROOT / service["build"]["dockerfile"]).read_text()
        bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
        (argument,) = {base.strip("${}") for base in bases}
        assert PINNED.fullmatch(service["build"]["args"][argument]), name
        # Built by hand, it begins with the same image.
        default = service["build"]["args"][argument].partition(":-")[2].rstrip("}")
        assert f"ARG {argument}={default}\n" in text


def test_nobody_knows_the_password_of_grafana() -> None:
    grafana = SERVICES["grafana"]
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "${SCALELLM_GRAFANA_PASSWORD:-}"
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    shell, script = grafana["entrypoint"][:-1], grafana["entrypoint"][-1].replace("$$", "$").replace("/run.sh", "true")
    for given, code in (
        ({}, 1),
        ({"GF_SECURITY_ADMIN_PASSWORD": "s"}, 0),
        ({"GF_SECURITY_ADMIN_PASSWORD__FILE": "f"}, 0),
    ):
        environment = {"PATH": os.environ["PATH"], "GF_SECURITY_ADMIN_PASSWORD": "", **given}
        done = subprocess.run([*shell, script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert ("SCALELLM_GRAFANA_PASSWORD" in done.stderr) == bool(code)


def test_a_second_model_is_served_run_and_fetched_by_one_name() -> None:
    text = SECOND_MODEL.read_text()
    services = yaml.safe_load(text)["services"]
    second = services["executor-second"]
    name = second["environment"]["SCALELLM_EXECUTOR_MODEL"]
    first = SERVICES["executor"]["environment"]["SCALELLM_EXECUTOR_MODEL"]
    assert services["tokenizer"]["environment"]["SCALELLM_TOKENIZER_MODEL"] == f"{first},{name}"
    assert services["models"]["command"] == [*SERVICES["models"]["command"], name]
    assert second["extends"] == {"file": "compose.yaml", "service": "executor"}
    # The scheduler looks up one name for all executors.
    executors = SERVICES["scheduler"]["environment"]["SCALELLM_SCHEDULER_EXECUTORS"]
    assert second["networks"]["line"]["aliases"] == [executors.partition(":")[0]]


class WithTags(yaml.SafeLoader):
    """Reads files with Compose's own tags."""


WithTags.add_constructor("!reset", lambda loader, node: None)


def test_the_executor_of_a_second_model_is_secured_as_the_first_is() -> None:
    secured = yaml.load(SECURE.read_text(), WithTags)["services"]
    first = secured["executor"]
    assert first["environment"].keys() >= {"SCALELLM_EXECUTOR_TLS_CERT", "SCALELLM_EXECUTOR_LINK_TOKEN_FILE"}
    (second,) = (yaml.safe_load(SECOND_MODEL.read_text())["services"].keys() - SERVICES.keys()) - secured.keys()
    assert yaml.safe_load(SECURE_SECOND_MODEL.read_text())["services"] == {
        second: {
            "extends": {"file": str(SECURE.relative_to(ROOT)), "service": "executor"},
            "volumes": first["volumes"],
        }
    }
    assert first.keys() == {"environment", "volumes"}, "the comment on relative paths holds for other keys as well"


def test_every_variable_is_in_the_manual() -> None:
    named = set(VARIABLE.findall((ROOT / "compose.yaml").read_text() + SECOND_MODEL.read_text()))
    manual = (ROOT / "docs" / "operations" / "deploy.md").read_text()
    # A list of several goes on with their ends: `SCALELLM_MEMORY_TOKENIZER`, `_SCHEDULER`.
    assert {name for name in named if not re.search(rf"`{name}`|`_{name.rpartition('_')[2]}`", manual)} == set()
