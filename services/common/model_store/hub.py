"""Models of the Hugging Face Hub: `org/name`, fetched into the cache that all of its libraries share."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from scalellm.services.common.gguf_parts import split_name
from scalellm.services.common.model_store.errors import ModelStoreError, UnknownModelError

_NAME = re.compile(
    r"(?P<repo>[\w][\w.-]{0,95}/[\w][\w.-]{0,95})(?:@(?P<revision>[\w][\w./-]{0,255}))?(?::(?P<choice>[\w.-]{1,128}))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT_CHOICE = "Q4_K_M"
_INDEX = "model.safetensors.index.json"
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model as it is named on the command line: `org/name`, `org/name@revision`, `org/name:Q4_K_M`.

    Attributes:
        repo: The repository.
        revision: A branch, tag or commit.
        choice: One of its GGUF files: a part of the name, as quantisations are named; empty: the repository
            has weights in safetensors, or one GGUF file, or one with Q4_K_M, as in llama.cpp.
    """

    repo: str
    revision: str = "main"
    choice: str = ""

    @classmethod
    def parse(cls, name: str) -> HubModel | None:
        """Return the model that `name` may stand for; None when it has not the form of one."""
        found = _NAME.fullmatch(name)
        if found is None or ".." in name or "--" in found["repo"]:
            return None
        return cls(found["repo"], found["revision"] or "main", found["choice"] or "")

    @property
    def served_name(self) -> str:
        """The name that clients see."""
        return f"{self.repo}:{self.choice}" if self.choice else self.repo

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision != "main" else ""
        return f"{self.repo}{revision}" + (f":{self.choice}" if self.choice else "")


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a repository that make up a model, and its first GGUF file, if it has any."""

    names: tuple[str, ...]
    first: str = ""


def find_cached(model: HubModel) -> Path | None:
    """Return the folder or GGUF file of a model that was fetched before; None unless all of it is here."""
    snapshot = _snapshot(model)
    if snapshot is None:
        return None
    try:
        files = _choose(model, _names(snapshot))
    except UnknownModelError:
        return None
    return _path_of(files, snapshot) if _is_whole(files, snapshot) else None


def pull_from_hub(model: HubModel, on_bytes: Callable[[int, int], None]) -> Path:
    """Fetch a model, or its missing files, and return its folder or its GGUF file.

    After a broken connection a file is continued, and files that were complete when a pull ended are kept. If the Hub
    cannot be reached, an earlier copy is used.

    Args:
        model: The model.
        on_bytes: Called several times a second with the bytes fetched so far and those of the whole model.

    Raises:
        UnknownModelError: The repository, revision or file does not exist.
        ModelStoreError: The Hub cannot be reached, the repository may not be read, or there is not enough space.
    """
    try:
        return _pull(model, on_bytes)
    except UnknownModelError:
        raise
    except ModelStoreError:
        if (path := find_cached(model)) is None:
            raise
        return path


def _pull(model: HubModel, on_bytes: Callable[[int, int], None]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download  # takes half a second
    from huggingface_hub.utils.logging import set_verbosity_error
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    set_verbosity_error()  # type: ignore[no-untyped-call]  # what it tries again is its business
    with _explained(model):
        info = HfApi().model_info(model.repo, revision=model.revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    files = _choose(model, sorted(siblings))
    wanted = [siblings[name] for name in files.names]
    total = sum(sibling.size or 0 for sibling in wanted)
    etags = {sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or "": sibling.size or 0 for sibling in wanted}
    blobs = _repo_folder(model) / "blobs"
    with _explained(model), _polling(lambda: on_bytes(_bytes_here(blobs, etags), total)):
        paths = [Path(hf_hub_download(model.repo, name, revision=model.revision)) for name in files.names]
    # All names begin at the snapshot's folder.
    depths = [len(PurePosixPath(name).parts) for name in files.names]
    snapshots = {path.parents[depth - 1] for path, depth in zip(paths, depths, strict=True)}
    if len(snapshots) != 1:
        raise ModelStoreError(f"{model} was changed on the Hub while it was fetched; run the pull again")
    return _path_of(files, snapshots.pop())


def list_cached() -> list[tuple[HubModel, Path, int]]:
    """Return the models of the shared cache that can be served: name, place and bytes."""
    found = []
    for folder in sorted(_cache().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        for ref in sorted((folder / "refs").glob("*")):
            model = HubModel.parse(f"{repo}@{ref.name}")
            snapshot = _snapshot(model) if model is not None else None
            if model is None or snapshot is None:
                continue
            names = _names(snapshot)
            choices = [HubModel(model.repo, model.revision, label) for label in map(_label, _gguf_sets(names).values())]
            found += [
                (entry, path, _size(_choose(entry, names), snapshot))
                for entry in (model, *choices)
                if (path := find_cached(entry)) is not None and (path.is_dir() or entry.choice)
            ]
    return found


def remove_cached(model: HubModel) -> int | None:
    """Remove a repository from the shared cache, with all its revisions and files.

    Returns the bytes freed, None where there was nothing. Raises ModelStoreError.
    """
    folder = _repo_folder(model)
    if not folder.is_dir():
        return None
    freed = sum(path.stat().st_size for path in (folder / "blobs").glob("*"))
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ModelStoreError(f"cannot remove {folder}: {error.strerror or error}") from error
    return freed


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _repo_folder(model: HubModel) -> Path:
    return _cache() / f"models--{model.repo.replace('/', '--')}"


def _snapshot(model: HubModel) -> Path | None:
    """Return the folder of the revision that was fetched last."""
    folder = _repo_folder(model)
    commit = model.revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / model.revision).read_text().strip()
        except OSError:
            return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _names(snapshot: Path) -> list[str]:
    return sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())


def _choose(model: HubModel, names: Sequence[str]) -> _Files:
    """Return the files of a repository to fetch. Raises UnknownModelError if it has no model that can be served."""
    sets = _gguf_sets(names)
    if not model.choice and "config.json" in names and any(_is_weights(name) for name in names):
        return _Files((*filter(_belongs, names), *filter(_is_weights, names)))
    chosen = _of_choice(sets, model.choice or _DEFAULT_CHOICE)
    if not model.choice and len(sets) == 1:
        chosen = list(sets.values())
    if len(chosen) == 1:
        return _Files(tuple(chosen[0]), chosen[0][0])
    labels = ", ".join(f"{model.repo}:{_label(parts)}" for parts in sets.values())
    if not sets:
        has = "no GGUF files" if model.choice else "no weights in safetensors or GGUF files, and no others are read"
        raise UnknownModelError(f"{model} has {has}")
    what = f"{len(chosen)} GGUF files for" if chosen else "no GGUF file for"
    if model.choice:
        raise UnknownModelError(f"{model.repo} has {what} {model.choice}; choose one of: {labels}")
    raise UnknownModelError(f"{model.repo} has {len(sets)} GGUF files; choose one of: {labels}")


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors") and not name.startswith("consolidated")


def _belongs(name: str) -> bool:
    """True if a file beside the safetensors may be read by edge or executor."""
    parts = name.split("/")
    if len(parts) == 2 and parts[0] == "additional_chat_templates":
        return name.endswith(".jinja")
    return len(parts) == 1 and name.endswith((".json", ".jinja"))


def _gguf_sets(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the GGUF models of a repository by name, each as its file or its parts in order. Projectors are
    left out.
    """
    sets: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and not PurePosixPath(name).name.startswith("mmproj"):
            sets.setdefault(_stem(name), []).append(name)
    return sets


def _stem(name: str) -> str:
    split = split_name(name)
    return split[0] if split else name[: -len(".gguf")]


def _of_choice(sets: dict[str, list[str]], choice: str) -> list[list[str]]:
    choice = re.sub(r"\.gguf$", "", choice, flags=re.IGNORECASE)
    wanted = re.compile(rf"(?:.*[-._/])?{re.escape(choice)}", re.IGNORECASE)
    return [parts for stem, parts in sets.items() if wanted.fullmatch(stem)]


def _label(parts: Sequence[str]) -> str:
    """Return the name that chooses a GGUF model: the end of its file name, from the quantisation on."""
    stem = _stem(PurePosixPath(parts[0]).name)
    found = re.search(r"(?:UD-)?(?:I?Q\d\w*|BF16|F16|F32|MXFP4\w*)$", stem, re.IGNORECASE)
    return found[0] if found else stem


def _is_whole(files: _Files, snapshot: Path) -> bool:
    """True if all weights of a model were fetched. Small files were fetched before them, and so are complete
    as well.
    """
    if split := split_name(files.first):
        return len(files.names) == split[2]
    if files.first:
        return True
    try:
        shards = set(json.loads((snapshot / _INDEX).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return shards <= set(files.names)


def _path_of(files: _Files, snapshot: Path) -> Path:
    return snapshot / files.first if files.first else snapshot


def _size(files: _Files, snapshot: Path) -> int:
    return sum((snapshot / name).stat().st_size for name in files.names)


def _bytes_here(blobs: Path, sizes: dict[str, int]) -> int:
    """Return the bytes fetched of the wanted files. Incomplete files have the file's name and a suffix."""
    here = dict.fromkeys(sizes, 0)
    try:
        entries = list(os.scandir(blobs))
    except OSError:
        return 0
    for entry in entries:
        etag = entry.name.partition(".")[0]
        if etag in here:
            try:
                here[etag] = max(here[etag], min(entry.stat().st_size, sizes[etag]))
            except FileNotFoundError:  # it has just been moved into place
                continue
    return sum(here.values())


@contextmanager
def _polling(call: Callable[[], None]) -> Iterator[None]:
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(_POLL_SECONDS):
            call()

    call()
    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _explained(model: HubModel) -> Iterator[None]:
    """Turn the library's exceptions into ModelStoreErrors, whose one line says what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model.repo}"
    try:
        yield
    except errors.GatedRepoError:
        raise ModelStoreError(f"{model} is gated: accept its terms at {page}, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise UnknownModelError(
            f"there is no model {model.repo} at {constants.ENDPOINT}, or it is private: check the name, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UnknownModelError(f"{model.repo} has no revision {model.revision}; see {page}/tree/main") from None
    except errors.OfflineModeIsEnabled:
        raise ModelStoreError(f"{model} is not here, and HF_HUB_OFFLINE forbids fetching it") from None
    except Exception as error:
        raise ModelStoreError(_cause(model, error)) from error


def _cause(model: HubModel, error: Exception) -> str:
    from huggingface_hub import constants, errors

    response: Any = getattr(error, "response", None)
    if isinstance(error, errors.HfHubHTTPError) and response is not None:
        if response.status_code in (401, 403):
            return f"cannot fetch {model}: {constants.ENDPOINT} refuses HF_TOKEN; check the token and its rights"
        return f"cannot fetch {model}: {constants.ENDPOINT} answers {response.status_code}; try again later"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"cannot store {model} in {_cache()}: {error.strerror or error}"
    return (
        f"cannot fetch {model}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}); check the network, "
        "HTTPS_PROXY and HF_ENDPOINT, or give a name of `scalellm models list` or the path of a model you already have"
    )
