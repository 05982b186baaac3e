"""The secret that the services of one deployment share, by which they authenticate to one another."""

from __future__ import annotations

from pathlib import Path

from scalellm.services.common.reload import ConfigFileError, read_file

_MIN_LENGTH = 32
OPTION = "--link-token-file"


def read_token(path: Path) -> str:
    """Read the token in a file, without surrounding white space. Raises ConfigFileError."""
    token = read_file(path, OPTION).decode("ascii", errors="replace").strip()
    if len(token) < _MIN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigFileError(
            f"{OPTION}: {path} must hold one line of at least {_MIN_LENGTH} printable ASCII characters, such as: "
            "openssl rand -hex 32"
        )
    return token
