"""Two models behind one address, with deploy/second-model.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.request import Request, urlopen

import pytest

from compose_stack import ComposeStack

FIRST, SECOND = "smollm2-135m-instruct", "gemma3-270m"


@pytest.fixture(scope="module")
def stack() -> Iterator[ComposeStack]:
    stack = ComposeStack(COMPOSE_FILE="compose.yaml:deploy/second-model.yaml")
    try:
        stack.compose("build", timeout=1500)
        stack.compose("up", "--build", "--wait", "--wait-timeout", "300", timeout=600)
        yield stack
    finally:
        stack.down()
        stack.remove_images()


def ask(stack: ComposeStack, path: str, **body: object) -> dict:
    data = json.dumps(body).encode() if body else None
    request = Request(f"http://{stack.http_address}{path}", data, {"content-type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_the_files_together_are_valid_and_bound_the_second_executor(stack: ComposeStack) -> None:
    services = json.loads(stack.compose("config", "--format", "json"))["services"]
    first, second = services["executor"], services["executor-second"]
    differs = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    assert differs == {"environment", "networks"}
    assert second["environment"] == first["environment"] | {"SCALELLM_EXECUTOR_MODEL": SECOND}


def test_both_models_answer_by_their_names(stack: ComposeStack) -> None:
    assert [model["id"] for model in ask(stack, "/v1/models")["data"]] == [FIRST, SECOND]
    for name in (FIRST, SECOND):
        answer = ask(stack, "/v1/completions", model=name, prompt="Once upon a time", max_tokens=8, ignore_eos=True)
        assert (answer["model"], answer["usage"]["completion_tokens"]) == (name, 8)
    assert ask(stack, "/v1/completions", prompt="Once", max_tokens=1)["model"] == FIRST
