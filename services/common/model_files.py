"""The small JSON files of a model directory, read with one rule: an object, or a refusal that names the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ModelFileError(ValueError):
    """A file of a model cannot be used; the message is one line that names the file, the key and the value."""


def read_json_object(path: Path, *, missing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file, `missing` where it is given and there is no such file.

    Raises ModelFileError.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if missing is not None:
            return dict(missing)
        raise ModelFileError(f"{path} is missing") from error
    except RecursionError as error:
        raise ModelFileError(f"{path}: not readable JSON: values lie too deep in each other") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not readable JSON: {brief(error)}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: a JSON object is expected")
    return value


def brief(error: BaseException) -> str:
    """Return what an error of a library says in a line that is not too long to read."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def shown(value: object) -> str:
    """Return a value of a file for a message: however long it is, the message stays a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def shown_name(name: str) -> str:
    """Return the name of a key, tensor or file for a message, which stays a line."""
    return shown(name)[1:-1]
