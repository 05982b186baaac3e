"""The minor version of the links' protocol, and the versions that a service is compatible with."""

from __future__ import annotations

import grpc

from scalellm.services.common.errors import StatusError

API_MINOR = 2
"""Minor version of this service. It rises with each change that may be used only with peers that support it."""

LEASES_SINCE = 2
"""First version whose upstream sides renew leases."""

MOVES_SINCE = 2
"""First version whose downstream sides give requests back (Submit.in_place_of)."""

_OLDEST = API_MINOR - 1
"""Oldest version of a peer that this service accepts. Of two versions the newer one decides, because it knows the older
one."""


def check_api_minor(field: str, minor: int) -> None:
    """Raise StatusError FAILED_PRECONDITION if the peer's version, `minor`, is too old for this service."""
    if minor < _OLDEST:
        raise StatusError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"{field}: the peer speaks version {minor} of the link's protocol, this service version {API_MINOR}, "
            f"which works with version {_OLDEST} and later ones: upgrade the peer",
        )
