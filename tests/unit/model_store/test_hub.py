"""Models of the Hugging Face Hub, from one on the loopback interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from fake_hub import FakeHub, fake_hub
from scalellm.services.common import model_store
from scalellm.services.common.model_store import ModelStoreError, PullProgress, UnknownModelError
from scalellm.services.common.model_store.hub import HubModel

REPO = "org/tiny-model"
SHARDS = {f"model-0000{number}-of-00002.safetensors": bytes([number]) * 9000 for number in (1, 2)}
INDEX = json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()
TEXTS = {"config.json": b"{}", "tokenizer.json": b"{ }", "chat_template.jinja": b"x"}
OTHERS = {"README.md": b"#", "onnx/model.onnx": b"o", "original/params.json": b"{}", "consolidated.safetensors": b"c"}
SAFETENSORS = {**TEXTS, **SHARDS, "model.safetensors.index.json": INDEX}
GGUFS = {f"Tiny-{kind}.gguf": kind.encode() * 2000 for kind in ("Q4_K_M", "Q8_0", "BF16")}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Qwen/Qwen3-0.6B", HubModel("Qwen/Qwen3-0.6B")),
        ("a/b@v1.0", HubModel("a/b", "v1.0")),
        ("a/b:Q4_K_M", HubModel("a/b", choice="Q4_K_M")),
        ("a/b@refs/pr/1:x.gguf", HubModel("a/b", "refs/pr/1", "x.gguf")),
        *((name, None) for name in ("a", "a/b/c", "./a", "../b", "/a/b", "a/b:", "a/..", "a b/c", "http://a/b")),
    ],
)
def test_names(name: str, model: HubModel | None) -> None:
    assert HubModel.parse(name) == model
    if model is not None:
        assert str(model) == name


def test_a_repository_is_fetched_once_and_found_without_the_hub(hub: FakeHub, home: Path) -> None:
    hub.repos[REPO] = {**SAFETENSORS, **OTHERS}
    with pytest.raises(ModelStoreError, match=f"{REPO} is not here yet; run `scalellm models pull {REPO}`"):
        model_store.resolve(REPO, home)
    told: list[PullProgress] = []
    path = model_store.pull(REPO, home, told.append)
    assert contents(path) == SAFETENSORS
    total = sum(map(len, SAFETENSORS.values()))
    assert told[-1] == PullProgress("done", total, total)
    assert (told[0].done_bytes, told[0].total_bytes) == (0, total)
    hub.requests.clear()
    assert model_store.resolve(REPO, home) == path
    assert hub.requests == []
    assert model_store.pull(REPO, home) == path
    assert hub.downloads("config.json") == hub.downloads("model-00001-of-00002.safetensors") == []
    assert model_store.name_of(REPO) == REPO
    entry = model_store.list_models(home)[-1]
    assert (entry.name, entry.path, entry.size_bytes) == (REPO, path, total)


def test_a_new_version_is_taken_by_a_pull(hub: FakeHub, home: Path) -> None:
    hub.repos[REPO] = {**SAFETENSORS}
    first = model_store.pull(REPO, home)
    hub.repos[REPO]["config.json"] = b'{"new": 1}'
    assert model_store.resolve(REPO, home) == first
    second = model_store.pull(REPO, home)
    assert second != first
    assert contents(second) == hub.repos[REPO]
    assert model_store.resolve(REPO, home) == second
    assert model_store.pull(f"{REPO}@{hub.commit(REPO)}", home) == second
    with pytest.raises(UnknownModelError, match="org/tiny-model has no revision v9; see http"):
        model_store.pull(f"{REPO}@v9", home)


def test_a_download_that_was_cut_off_goes_on_where_it_ended(
    hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.repos[REPO] = {**TEXTS, "model.safetensors": bytes(range(256)) * 400}
    hub.cut_after = 50_000
    path = model_store.pull(REPO, home)
    assert contents(path) == hub.repos[REPO]
    assert hub.downloads("model.safetensors") == ["", "bytes=50000-"]


def test_gguf_files_are_chosen_by_their_quantisation(hub: FakeHub, home: Path) -> None:
    hub.repos[REPO] = {**GGUFS, "mmproj-Tiny.gguf": b"p", "README.md": b"#"}
    path = model_store.pull(f"{REPO}:q8_0", home)
    assert (path.name, path.read_bytes()) == ("Tiny-Q8_0.gguf", GGUFS["Tiny-Q8_0.gguf"])
    assert model_store.pull(REPO, home).name == "Tiny-Q4_K_M.gguf"
    assert model_store.pull(f"{REPO}:Tiny-BF16.gguf", home).name == "Tiny-BF16.gguf"
    assert [entry.name for entry in model_store.list_models(home) if entry.name.startswith("org/")] == [
        f"{REPO}:{kind}" for kind in ("BF16", "Q4_K_M", "Q8_0")
    ]
    with pytest.raises(UnknownModelError, match=f"no GGUF file for Q5_0; choose one of: {REPO}:BF16, {REPO}:Q4_K_M"):
        model_store.pull(f"{REPO}:Q5_0", home)
    del hub.repos[REPO]["Tiny-Q4_K_M.gguf"]
    with pytest.raises(UnknownModelError, match="has 2 GGUF files; choose one of"):
        model_store.pull(REPO, home)
    assert model_store.name_of(f"{REPO}:Q8_0") == f"{REPO}:Q8_0"


def test_all_parts_of_a_split_gguf_file_are_fetched(hub: FakeHub, home: Path) -> None:
    parts = {f"Q8_0/Tiny-Q8_0-0000{number}-of-00003.gguf": bytes([number]) * 5000 for number in (1, 2, 3)}
    hub.repos[REPO] = {**parts, "Tiny-Q2_K.gguf": b"2"}
    path = model_store.pull(f"{REPO}:Q8_0", home)
    assert path.name == "Tiny-Q8_0-00001-of-00003.gguf"
    assert contents(path.parent) == {name.removeprefix("Q8_0/"): content for name, content in parts.items()}
    (path.parent / "Tiny-Q8_0-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelStoreError, match="is not here yet"):
        model_store.resolve(f"{REPO}:Q8_0", home)


def test_what_cannot_be_fetched_says_why(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UnknownModelError, match=f"there is no model org/other at {hub.address}, or it is private"):
        model_store.pull("org/other", home)
    hub.repos[REPO] = {"pytorch_model.bin": b"p", "config.json": b"{}"}
    with pytest.raises(UnknownModelError, match="no weights in safetensors or GGUF files"):
        model_store.pull(REPO, home)
    with pytest.raises(UnknownModelError, match="org/tiny-model:Q8_0 has no GGUF files"):
        model_store.pull(f"{REPO}:Q8_0", home)
    hub.repos[REPO], hub.gated, hub.token = {**SAFETENSORS}, {REPO}, "hf_secret"
    with pytest.raises(ModelStoreError, match="is gated: accept its terms at http.*, then set HF_TOKEN") as refused:
        model_store.pull(REPO, home)
    assert not isinstance(refused.value, UnknownModelError)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert contents(model_store.pull(REPO, home)) == SAFETENSORS
    with pytest.raises(UnknownModelError, match="no model 'nonsense': it is neither a known name"):
        model_store.pull("nonsense", home)


def test_without_the_hub_what_is_here_is_used(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] = {**SAFETENSORS}
    path = model_store.pull(REPO, home)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert model_store.pull(REPO, home) == path
    with pytest.raises(ModelStoreError, match="http://127.0.0.1:9 cannot be reached .*HTTPS_PROXY and HF_ENDPOINT"):
        model_store.pull("org/other", home)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    hub.is_broken = True
    with pytest.raises(ModelStoreError, match=f"{hub.address} answers 503; try again later"):
        model_store.pull("org/other", home)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_store.pull(REPO, home) == path


def test_removing_frees_the_whole_repository(hub: FakeHub, home: Path) -> None:
    hub.repos[REPO] = {**GGUFS}
    model_store.pull(f"{REPO}:Q8_0", home)
    assert model_store.remove(f"{REPO}:Q8_0", home) == len(GGUFS["Tiny-Q8_0.gguf"])
    assert model_store.remove(REPO, home) is None
    assert model_store.remove("smollm2-135m-instruct", home) is None
    with pytest.raises(UnknownModelError, match="is not the name of a pulled model"):
        model_store.remove("/etc/passwd", home)


def test_a_folder_comes_before_a_repository_of_the_same_name(home: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "org" / "tiny-model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert model_store.resolve(REPO, home).resolve() == folder
    assert model_store.name_of(REPO) == "tiny-model"
