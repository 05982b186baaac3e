"""The launcher's credentials for secured services, from the environment that these were started with."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from scalellm.client.credentials import Credentials
from scalellm.launcher.errors import LauncherError
from scalellm.launcher.instance import EXECUTOR, SCHEDULER, TOKENIZER, Instance
from scalellm.services.common.link_token import read_token
from scalellm.services.common.new_file import write_new
from scalellm.services.common.reload import ConfigFileError

_LINK_TOKEN_FILES = tuple(f"SCALELLM_{kind.upper()}_LINK_TOKEN_FILE" for kind in (TOKENIZER, SCHEDULER, EXECUTOR))


def service_credentials(kind: str, variables: Mapping[str, str]) -> Credentials:
    """Return the credentials that a service of this kind is shown.

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


def make_link_token(instance: Instance, variables: Mapping[str, str]) -> None:
    """Make a link token for the services of an instance, unless `variables` name one for any of them."""
    if any(variables.get(name) for name in _LINK_TOKEN_FILES):
        instance.link_token.unlink(missing_ok=True)
    else:
        write_new(instance.link_token, f"{secrets.token_hex(32)}\n")


def with_link_token(instance: Instance, variables: Mapping[str, str]) -> Mapping[str, str]:
    """The variables with those that name the instance's own link token, if it has one."""
    if not instance.link_token.exists():
        return variables
    return {**variables, **dict.fromkeys(_LINK_TOKEN_FILES, str(instance.link_token))}


def _link_token(variables: Mapping[str, str]) -> str:
    path = variables.get("SCALELLM_SCHEDULER_LINK_TOKEN_FILE")
    try:
        return read_token(Path(path)) if path else ""
    except ConfigFileError as error:
        raise LauncherError(f"SCALELLM_SCHEDULER_LINK_TOKEN_FILE: {error}") from None
