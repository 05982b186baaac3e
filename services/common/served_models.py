"""The list of models that a service serves, with their names and sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scalellm.services.common.model_store import name_of


class ServedModel(NamedTuple):
    """One model.

    Attributes:
        name: The name under which clients and executors know it.
        source: A name of the catalogue or of the Hub, a directory or a file.
    """

    name: str
    source: str


def read_models(listed: str, only_name: str = "") -> tuple[ServedModel, ...]:
    """Parse a list MODEL,NAME=MODEL,... If the whole text is the path of a file or directory, it is one model.

    Args:
        listed: The list.
        only_name: Name of the model if the list has only one; empty: the model's own name.

    Raises ValueError.
    """
    return name_models([listed] if Path(listed).expanduser().exists() else _split(listed), only_name)


def name_models(parts: Sequence[str], only_name: str = "") -> tuple[ServedModel, ...]:
    """Parse the parts of a list, each MODEL or NAME=MODEL. Arguments and errors as in `read_models`."""
    if not all(parts):
        raise ValueError("a model is missing: must be MODEL or NAME=MODEL, with commas between several")
    models = tuple(map(_read_one, parts))
    if only_name and len(models) > 1:
        raise ValueError("is for one model; give several models their names with NAME=MODEL")
    if only_name:
        return (models[0]._replace(name=only_name),)
    name, times = Counter(model.name for model in models).most_common(1)[0]
    if times > 1:
        raise ValueError(f"two models have the name {name!r}; give them others: NAME=MODEL")
    return models


def join_models(models: Mapping[str, Path]) -> str:
    """Format models, given by name, as a list for `read_models`.

    Raises ValueError for a name or path with characters that are special in the list.
    """
    listed = ",".join(f"{name}={path}" for name, path in models.items())
    if [tuple(part.partition("=")[::2]) for part in _split(listed)] != [(n, str(path)) for n, path in models.items()]:
        raise ValueError(f"names of several models have no comma and no =, their paths no comma: {listed}")
    return listed


def _split(listed: str) -> list[str]:
    return [part.strip() for part in listed.split(",")]


def _read_one(part: str) -> ServedModel:
    name, sign, source = part.partition("=")
    if not sign or Path(part).expanduser().exists():
        return ServedModel(name_of(part), part)
    if not (name and source):
        raise ValueError(f"must be NAME=MODEL, got {part!r}")
    return ServedModel(name, source)
