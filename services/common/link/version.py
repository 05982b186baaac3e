"""The minor version of the links' protocol, and which other ones a service works with."""

from __future__ import annotations

import grpc

from scalellm.services.common.errors import StatusError

API_MINOR = 2
"""Minor version of this service. It rises with each change that a peer must know of before it may be used."""

LEASES_SINCE = 2
"""The version whose upstream sides renew leases."""

MOVES_SINCE = 2
"""The version whose downstream sides give requests back."""

_OLDEST = API_MINOR - 1
"""The oldest peer that this service works with. What a newer one cannot work with, that one refuses: it knows this
version, and this service does not know its."""


def check_api_minor(field: str, minor: int) -> None:
    """Raise FAILED_PRECONDITION when the peer, which speaks `minor`, is too old for this service."""
    if minor < _OLDEST:
        raise StatusError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"{field}: the peer speaks version {minor} of the link's protocol, this service version {API_MINOR}, "
            f"which works with version {_OLDEST} and later ones: upgrade the peer",
        )
