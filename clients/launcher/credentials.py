"""How the launcher asks services that are secured, from the environment that they were started with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clients.client.credentials import Credentials
from clients.launcher.errors import LauncherError
from clients.launcher.instance import TOKENIZER
from services.common.link_token import read_token
from services.common.reload import ConfigFileError


def service_credentials(kind: str, variables: Mapping[str, str]) -> Credentials:
    """What a service of this kind is shown.

    The public service gets what every client shows (SCALELLM_API_KEY, SCALELLM_TLS_*), an internal one what the
    scheduler shows to executors (SCALELLM_SCHEDULER_LINK_*). Raises LauncherError.
    """
    if kind == TOKENIZER:
        prefix, secret, name = "SCALELLM_TLS", variables.get("SCALELLM_API_KEY", ""), ""
    else:
        prefix, secret = "SCALELLM_SCHEDULER_LINK_TLS", _link_token(variables)
        name = variables.get(f"{prefix}_NAME", "")
    if not variables.get(f"SCALELLM_{kind.upper()}_TLS_CERT"):
        return Credentials(secret)
    ca, cert, key = (
        Path(path) if (path := variables.get(f"{prefix}_{end}")) else None for end in ("CA", "CERT", "KEY")
    )
    if ca is None:
        raise LauncherError(f"SCALELLM_{kind.upper()}_TLS_CERT is set: set {prefix}_CA as well, to be able to ask it")
    return Credentials(secret, ca, cert, key, name)


def _link_token(variables: Mapping[str, str]) -> str:
    path = variables.get("SCALELLM_SCHEDULER_LINK_TOKEN_FILE")
    try:
        return read_token(Path(path)) if path else ""
    except ConfigFileError as error:
        raise LauncherError(f"SCALELLM_SCHEDULER_LINK_TOKEN_FILE: {error}") from None
