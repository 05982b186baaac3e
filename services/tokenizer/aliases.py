"""Aliases: names that stand for models, several of which share the requests of one name by weights."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from pydantic import Field, TypeAdapter

from scalellm.services.common.reload import ConfigFileError, Reloaded
from scalellm.services.common.similar_names import did_you_mean
from scalellm.services.common.toml_file import read_toml

OPTION = "--aliases"

_Name = Annotated[str, Field(min_length=1, max_length=128)]
_Weight = Annotated[float, Field(gt=0, le=1e6, strict=True)]
_Weights = Annotated[dict[_Name, _Weight], Field(min_length=1, max_length=16)]
FILE_FORMAT = TypeAdapter(Annotated[dict[_Name, _Weights], Field(max_length=64)])
"""Weights of models by their names, by the names of aliases. The chart's schema of values has the same limits."""


class Alias:
    """A name that stands for models.

    Args:
        weights: Weight of each model, by the model's name: at least one, each above 0.

    Attributes:
        main: The model with the largest weight, of equal ones the first.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self.main = max(weights, key=weights.__getitem__)

    def choose(self, tenant: str, identity: bytes) -> str:
        """Return the model of a request: of many requests each model gets the share that its weight is of all.

        The choice follows from the arguments and the weights (weighted rendezvous hashing). So where weights change,
        only requests change their model whose share has to move.

        Args:
            tenant: Name of the tenant of the request.
            identity: Distinguishes the request from others of the tenant; see `identity_of`.
        """

        def arrival(model: str) -> float:
            """Time of exponential distribution with the weight as its rate: the first to arrive is chosen."""
            digest = hashlib.blake2b(f"{tenant}\0{model}\0".encode() + identity, digest_size=8).digest()
            return -math.log((int.from_bytes(digest, "big") + 1) / (2**64 + 1)) / self._weights[model]

        return min(self._weights, key=arrival)


def identity_of(request_id: str, seed: int | None, prompt: Callable[[], object]) -> bytes:
    """Return what is the same when a request is sent again: its id, or seed and prompt; without both, nothing is.

    Every API asks this function, so that a request has the same identity whichever of them it comes by.

    Args:
        request_id: Id that the client gave the request; empty: none.
        seed: Seed of its sampling; None: none.
        prompt: Returns its prompt as a JSON value: a text, token ids, or messages. Called only where there is no id.
    """
    if request_id:
        return request_id.encode(errors="replace")
    if seed is None:
        return secrets.token_bytes(16)
    return json.dumps([seed % 2**64, prompt()], sort_keys=True).encode()


class Aliases:
    """The aliases of a file, read again when it changes; a file with a mistake leaves them as they were.

    Args:
        path: The file, `read_aliases` says of what form; None: there are no aliases.
        models: Names of the models that are served.

    Raises ConfigFileError.
    """

    def __init__(self, path: Path | None = None, models: Sequence[str] = ()) -> None:
        self._file = Reloaded((path,), lambda: read_aliases(path, models)) if path is not None else None

    @property
    def by_name(self) -> Mapping[str, Alias]:
        """The aliases, in the order of the file."""
        return self._file.value if self._file is not None else MappingProxyType({})

    @property
    def is_failing(self) -> bool:
        """True while the file cannot be read. Looks at the file: to be asked about once a second."""
        if self._file is None:
            return False
        self._file.refresh()
        return self._file.failing_since is not None


def read_aliases(path: Path, models: Sequence[str]) -> Mapping[str, Alias]:
    """Return the aliases of a TOML file by name: a table for each, with the weight of each of its models.

    Args:
        path: The file.
        models: Names of the models that are served.

    Raises ConfigFileError.
    """
    found = read_toml(path, OPTION, FILE_FORMAT.validate_python)
    for name, weights in found.items():
        if name in models:
            raise ConfigFileError(f"{OPTION}: {path}: {name}: is the name of a model; an alias needs another one")
        for model in weights:
            if model not in models:
                served = did_you_mean(model, models) or f"; served are {', '.join(models)}"
                raise ConfigFileError(f"{OPTION}: {path}: {name}.{model}: is not a model that is served{served}")
    return MappingProxyType({name: Alias(weights) for name, weights in found.items()})
