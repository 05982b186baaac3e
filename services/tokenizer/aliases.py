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
"""Format of the file: by alias, the weight of each model by its name. The chart's schema of values has the same
limits."""


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
        """Choose the model of a request, such that each model gets its weight's share of many requests.

        The choice depends on the arguments and the weights alone (weighted rendezvous hashing), so a change of weights
        moves no more requests to other models than the change of shares requires.

        Args:
            tenant: Name of the tenant of the request.
            identity: Distinguishes the request from others of the tenant; see `identity_of`.
        """

        def arrival(model: str) -> float:
            """Draw an exponentially distributed time with the weight as its rate. The model with the least time is
            chosen.
            """
            digest = hashlib.blake2b(f"{tenant}\0{model}\0".encode() + identity, digest_size=8).digest()
            return -math.log((int.from_bytes(digest, "big") + 1) / (2**64 + 1)) / self._weights[model]

        return min(self._weights, key=arrival)


def identity_of(request_id: str, seed: int | None, prompt: Callable[[], object]) -> bytes:
    """Return the identity of a request, which stays the same when it is sent again: its id, or else its seed and
    prompt; without id and seed, a random one.

    All APIs use this function, so that a request has the same identity by whichever of them it comes.

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
    """The aliases of a file, which is read again when it changes. If the file has an error, the last valid ones stay.

    Args:
        path: The file, in the format of `read_aliases`; None: there are no aliases.
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
        """True while the file cannot be read. Checks the file for changes, so it should be read about once a second."""
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
