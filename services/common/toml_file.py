"""Reading of configured TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from scalellm.services.common.reload import ConfigFileError, read_file

T = TypeVar("T")


def read_toml(path: Path, option: str, validate: Callable[[Any], T]) -> T:
    """Return the contents of a file that `option` names.

    Args:
        path: The file.
        option: The option that names it, for messages.
        validate: A pydantic validator of the parsed document.

    Raises ConfigFileError with the option, the file, the field and the limit.
    """
    try:
        return validate(tomllib.loads(read_file(path, option).decode()))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(map(str, first["loc"]))  # empty for the whole document
        raise ConfigFileError(": ".join(filter(None, (option, str(path), field, first["msg"])))) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{option}: {path} is not TOML: {error}") from None
