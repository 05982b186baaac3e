"""API keys, which identify the caller, its role, and its tenant with the tenant's limits.

Keys are random tokens of 256 bits, so a plain SHA-256 of one can neither be inverted nor guessed, and the look-up of a
digest in a dictionary does not compare secrets byte by byte.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from scalellm.services.common.reload import ConfigFileError
from scalellm.services.common.toml_file import read_toml

OPTION = "--api-keys"
_KEY_PREFIX = "slm-"

# No colon, which separates the parts of Redis keys.
TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
_Count = Annotated[int, Field(ge=1, le=2**53)]


class Role(StrEnum):
    """The rights of a caller."""

    USER = "user"
    """May generate, and use its tenant's sessions and kept answers."""
    ADMIN = "admin"
    """May do what a user may, and operate the services."""
    LINK = "link"
    """May open links: another service of the same deployment, identified by the link token."""


class TenantLimits(BaseModel):
    """Limits of a tenant, over all processes that serve it. None: no limit.

    Attributes:
        session_bytes: Most bytes of its sessions; None: the limit in the tokenizer's settings.
        kept_bytes: Most bytes of its kept answers; None: the limit in the tokenizer's settings.
        weight: Its share relative to other tenants when they compete for tokens, rows of executors, or places in the
            scheduler's queue.
        min_priority: The most urgent priority (lowest value) of its requests. More urgent requests run before those of
            other tenants, so they have to be permitted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrent_requests: _Count | None = None
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    session_bytes: _Count | None = None
    kept_bytes: _Count | None = None
    weight: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    min_priority: Annotated[int, Field(ge=-100, le=0)] = 0

    @property
    def is_counted(self) -> bool:
        """True if the tenant's use has to be counted."""
        return not (self.concurrent_requests is self.requests_per_minute is self.tokens_per_minute is None)


NO_LIMITS = TenantLimits()


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer on whose behalf requests run. Sessions and cached prefixes belong to one tenant."""

    name: str
    limits: TenantLimits = NO_LIMITS


DEFAULT_TENANT = Tenant("default", TenantLimits(min_priority=-100))
"""The tenant of all callers if no API keys are configured."""


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller."""

    tenant: Tenant
    role: Role


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tenant: TenantName
    role: Role = Role.USER


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[_Key] = Field(default_factory=list)
    tenants: dict[TenantName, TenantLimits] = Field(default_factory=dict)
    limits: TenantLimits = NO_LIMITS


def digest(secret: str) -> bytes:
    """Return the digest that is stored in place of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def new_key() -> str:
    """Return a new random key."""
    return _KEY_PREFIX + secrets.token_urlsafe(32)


def key_entry(key: str, tenant: str, role: Role) -> str:
    """Return the entry of a key for the file of keys."""
    return f'[[keys]]\nsha256 = "{digest(key).hex()}"\ntenant = "{tenant}"\nrole = "{role}"\n'


def read_api_keys(path: Path) -> Mapping[bytes, Principal]:
    """Read a file of keys. Returns the callers by the digests of their keys. Raises ConfigFileError."""
    parsed = read_toml(path, OPTION, _KeyFile.model_validate)
    found: dict[bytes, Principal] = {}
    for index, key in enumerate(parsed.keys):
        if key.role is Role.LINK:
            raise ConfigFileError(f"{OPTION}: {path}: keys.{index}.role: must be user or admin")
        tenant = Tenant(key.tenant, parsed.tenants.get(key.tenant, parsed.limits))
        if found.setdefault(bytes.fromhex(key.sha256), principal := Principal(tenant, key.role)) is not principal:
            raise ConfigFileError(f"{OPTION}: {path}: keys.{index}.sha256: the key is listed twice")
    return MappingProxyType(found)
