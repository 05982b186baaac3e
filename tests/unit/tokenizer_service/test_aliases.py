"""Aliases: which model a request goes to, and files of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scalellm.services.common.api_keys import DEFAULT_TENANT, Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.common.reload import ConfigFileError
from scalellm.services.tokenizer.aliases import Alias, Aliases, read_aliases
from scalellm.services.tokenizer.generation.edges import Edges
from scalellm.services.tokenizer.generation.grpc_face import GenerationServicer
from scalellm.services.tokenizer.http.service_routes import choose_edge
from scalellm.v1 import common_pb2, generation_pb2

MODELS = ("small", "next", "other")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class Began:
    """Beginnings of requests, in place of Redis."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def of(self, tenant: Tenant) -> Began:
        return self

    async def model_of(self, *key: object) -> str:
        return self.models.get(str(key[-1]), "")


def make_edges(path: Path, text: str, models: tuple[str, ...] = MODELS) -> tuple[Edges, Began]:
    edges, began = Edges(Aliases(write(path, text), models)), Began()
    access = SimpleNamespace(tenant=lambda: DEFAULT_TENANT)
    for name in models:
        edge: Any = SimpleNamespace(model_name=name, sessions=began, kept=began, access=access, models=edges)
        edges.add(edge)
    return edges, began


async def model_of(edges: Edges, identity: str = "", name: str | None = "chat", **more: str) -> str:
    return (await edges.of_request(name, DEFAULT_TENANT, identity.encode, **more)).model_name


@pytest.mark.parametrize("kind", ["identity", "session_id", "kept_id"])
async def test_models_get_their_shares(tmp_path: Path, kind: str) -> None:
    weights = {"small": 70, "next": 25, "other": 5}
    edges, _ = make_edges(tmp_path / "aliases.toml", "chat = {small = 70, next = 25, other = 5}")
    found = Counter([await model_of(edges, **{kind: f"{number}"}) for number in range(2000)])
    assert {name: found[name] / 2000 for name in weights} == pytest.approx(
        {name: weight / 100 for name, weight in weights.items()}, abs=0.02
    )


async def test_a_request_that_comes_again_goes_to_the_same_model(tmp_path: Path) -> None:
    text = "chat = {small = 1, next = 1}"
    first, _ = make_edges(tmp_path / "one.toml", text)
    second, _ = make_edges(tmp_path / "two.toml", text, ("next", "other", "small"))
    for number in range(50):
        assert await model_of(first, f"req-{number}") == await model_of(second, f"req-{number}")


def test_a_change_of_weights_moves_only_the_share_that_has_to_move() -> None:
    before = Alias({"small": 95, "next": 5})
    after = Alias({"next": 20, "small": 80})
    moves = Counter((before.choose("t", b"%d" % n), after.choose("t", b"%d" % n)) for n in range(2000))
    assert moves["next", "small"] == 0
    assert moves["small", "next"] / 2000 == pytest.approx(0.15, abs=0.02)


async def test_what_began_with_a_model_stays_with_it(tmp_path: Path) -> None:
    edges, began = make_edges(tmp_path / "aliases.toml", "chat = {small = 1}")
    began.models = {"old": "next", "gone": "removed"}
    assert await model_of(edges, session_id="old") == "next"
    assert await model_of(edges, kept_id="old") == "next"
    assert await model_of(edges, session_id="new") == "small"
    with pytest.raises(StatusError, match=r"model: 'removed', with which this began, is served no more"):
        await model_of(edges, session_id="gone")
    assert await model_of(edges, earlier="other") == await model_of(edges, name=None, earlier="other") == "other"
    assert await model_of(edges, earlier="removed") == "small", "an answer that is only text can go on with any model"


async def test_names_of_models_and_no_name_are_as_without_aliases(tmp_path: Path) -> None:
    edges, _ = make_edges(tmp_path / "aliases.toml", "chat = {next = 9, other = 1}")
    assert [await model_of(edges, name=name) for name in (None, *MODELS)] == ["small", *MODELS]
    assert edges.choose("chat").model_name == "next", "the largest weight, where nothing is generated"
    with pytest.raises(StatusError, match=r"model: 'chta' is not served here, only 'small' and .* and 'chat' are"):
        await model_of(edges, name="chta")


async def test_one_model_has_aliases_as_well(tmp_path: Path) -> None:
    edges, _ = make_edges(tmp_path / "aliases.toml", "gpt-4o = {small = 1}", ("small",))
    assert await model_of(edges, name="gpt-4o", session_id="any") == "small"


class ChosenError(Exception):
    """A model was chosen; the argument is its name. Nothing is generated."""


async def chosen_over_grpc(edges: Edges, given_id: str = "", **asked: Any) -> str:
    class Choosing:
        async def of_request(self, *arguments: Any, **more: Any) -> None:
            raise ChosenError((await edges.of_request(*arguments, **more)).model_name)

    edge: Any = SimpleNamespace(models=Choosing(), access=edges.default.access)
    seed, prompt = asked.pop("seed", None), asked.pop("prompt", None)
    if "messages" in asked:
        asked["chat"] = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(**it) for it in asked.pop("messages")])
    if isinstance(prompt, list):
        asked["tokens"] = generation_pb2.TokenIds(ids=prompt)
    elif prompt is not None:
        asked["prompt"] = prompt
    request = generation_pb2.GenerateRequest(
        model="chat", request_id=given_id, sampling=common_pb2.SamplingParams(seed=seed, max_tokens=8), **asked
    )
    context: Any = None
    with pytest.raises(ChosenError) as chosen:
        await GenerationServicer(edge).Generate(request, context)
    return str(chosen.value)


async def chosen_over_http(edges: Edges, given_id: str = "", **body: Any) -> str:
    call: Any = SimpleNamespace(given_id=given_id)
    return (await choose_edge(edges.default, call, body, "chat")).model_name


@pytest.mark.parametrize("choose", [chosen_over_grpc, chosen_over_http])
async def test_requests_are_known_by_id_or_by_seed_and_prompt(
    tmp_path: Path, choose: Callable[..., Awaitable[str]]
) -> None:
    edges, _ = make_edges(tmp_path / "aliases.toml", "chat = {small = 1, next = 1}")
    rivers = [{"role": "user", "content": "Rivers"}]
    for known in ({"given_id": "one"}, {"seed": 0, "messages": rivers}, {"seed": 0, "prompt": "Rivers"}):
        assert len({await choose(edges, **known) for _ in range(20)}) == 1
    assert len({await choose(edges, given_id="one", seed=seed, prompt="Lakes") for seed in range(20)}) == 1
    assert len({await choose(edges, prompt="Rivers") for _ in range(40)}) == 2, "drawn for each, without id and seed"
    assert len({await choose(edges, seed=0, prompt=f"Rivers {n}") for n in range(20)}) == 2, "another prompt"
    assert len({await choose(edges, seed=seed, prompt="Rivers") for seed in range(20)}) == 2, "another seed"


async def test_a_request_goes_to_the_same_model_over_both_protocols(tmp_path: Path) -> None:
    edges, _ = make_edges(tmp_path / "aliases.toml", "chat = {small = 1, next = 1}")
    asked: list[dict[str, Any]] = []
    for number in range(12):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"River {number}?"}]
        asked += [
            {"given_id": f"req-{number}"},
            {"seed": number, "prompt": f"Rivers of \u00c5land, {number}"},
            {"seed": 2**64 - 1, "prompt": [1, 2, number]},
            {"seed": number, "messages": messages},
        ]
    over_grpc = [await chosen_over_grpc(edges, **each) for each in asked]
    assert [await chosen_over_http(edges, **each) for each in asked] == over_grpc
    in_body = [await chosen_over_http(edges, "other", request_id=f"req-{number}") for number in range(12)]
    assert in_body == over_grpc[::4], "the id in the body goes before that of the header"
    negative = [await chosen_over_http(edges, seed=-1, prompt=[1, 2, number]) for number in range(12)]
    assert negative == over_grpc[2::4], "-1 is the seed 2**64 - 1"


def test_a_file_that_changes_is_read_again_and_a_broken_one_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "aliases.toml", "chat = {small = 1}")
    aliases = Aliases(path, MODELS)
    assert not aliases.is_failing
    write(path, "chat = {next = 1}\ncode = {small = 1}")
    assert not aliases.is_failing
    assert (list(aliases.by_name), aliases.by_name["chat"].main) == (["chat", "code"], "next")
    with caplog.at_level(logging.ERROR):
        write(path, "chat = {unknown = 1}")
        assert [aliases.is_failing, aliases.is_failing] == [True, True]
    assert [record.message for record in caplog.records] == [
        f"{path} changed, but what was read before stays in use: --aliases: {path}: chat.unknown: is not a model that "
        "is served; served are small, next, other"
    ]
    assert list(aliases.by_name) == ["chat", "code"]
    path.unlink()
    assert aliases.is_failing
    write(path, "")
    assert not aliases.is_failing
    assert not aliases.by_name


def many(number: int, of: str) -> str:
    return "\n".join(of.format(index) for index in range(number))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("chat = {smal = 1}", r"chat\.smal: is not a model that is served; did you mean small\?"),
        ("chat = {code = 1}\ncode = {small = 1}", r"chat\.code: is not a model that is served"),
        ("small = {next = 1}", r"small: is the name of a model"),
        ("chat = {small = 0}", r"chat\.small: .*greater than 0"),
        ("chat = {small = 95, next = -5}", r"chat\.next: .*greater than 0"),
        ("chat = {small = nan}", r"chat\.small: "),
        ("chat = {small = inf}", r"chat\.small: .*less than or equal to 1000000"),
        ("chat = {small = '1'}", r"chat\.small: .*number"),
        ("chat = {small = true}", r"chat\.small: .*number"),
        ("chat = {}", r"chat: .*at least 1 item"),
        ("chat = 'small'", r"chat: .*dictionary"),
        ("'' = {small = 1}", r"at least 1 character"),
        (f"{'a' * 129} = {{small = 1}}", r"at most 128 characters"),
        (many(65, "a{} = {{small = 1}}"), r"at most 64 items"),
        ("[chat]\n" + many(17, "m{} = 1"), r"chat: .*at most 16 items"),
        ("chat = {small = 1", "is not TOML"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_the_name_and_the_limit(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path / "aliases.toml", text)
    with pytest.raises(ConfigFileError, match=rf"^--aliases: {path}.*{told}"):
        read_aliases(path, MODELS)
