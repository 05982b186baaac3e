"""Reading of the small JSON files of a model directory, which must be objects, with errors that name the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ModelFileError(ValueError):
    """A file of a model cannot be used; the message is one line that names the file, the key and the value."""


def read_json_object(path: Path, *, missing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file; `missing`, if given, if the file does not exist.

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
    """Return the message of a library's error, shortened to a readable line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def shown(value: object) -> str:
    """Return a value of a file for a message, shortened so that the message stays one line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def shown_name(name: str) -> str:
    """Return the name of a key, tensor or file for a message, shortened so that the message stays one line."""
    return shown(name)[1:-1]
