"""The error of a call."""

from __future__ import annotations

import re

import grpc

from scalellm.client.credentials import NO_CREDENTIALS, Credentials
from scalellm.client.error_details import ErrorDetails, read_details

# HTTP/2's REFUSED_STREAM, in gRPC's words: the server closed the stream without having looked at it.
_REFUSED = "RST_STREAM with error code 7"

# gRPC's own message when nobody answers at the address; a server's UNAVAILABLE has another one.
_UNREACHABLE = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")

# Somebody listens there: the connection was made, and then closed again, by us or by them.
_REJECTED_BY_US = re.compile(
    "WRONG_VERSION_NUMBER|CERTIFICATE_VERIFY_FAILED|Hostname Verification Check failed|handshake failed"
)
_REJECTED_BY_THEM = re.compile("Socket closed|Connection reset by peer")


class ClientError(Exception):
    """A call ended with a status other than OK.

    Args:
        code: The gRPC status code.
        message: The server's message; for bad input it names the field and the limit.
        field: The request's field at fault, where the server names one.
        retry_after: Seconds after which a retry may succeed, where the server says so.
        unreachable: The address at which nothing answers, where that is why: the request never reached a server.
        misconfigured: True if client and server do not agree on TLS, so that trying again will not help.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        field: str = "",
        retry_after: float | None = None,
        unreachable: str = "",
        misconfigured: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_after = retry_after
        self.unreachable = unreachable
        self.misconfigured = misconfigured

    @classmethod
    def from_rpc(cls, error: grpc.RpcError, address: str, shown: Credentials = NO_CREDENTIALS) -> ClientError:
        """The same from what gRPC raises on a call to `address`, with the google.rpc details that came along.

        Args:
            error: The exception.
            address: Address of the call.
            shown: Credentials of the connection.
        """
        code: grpc.StatusCode = error.code()
        message = error.details() or code.name.lower().replace("_", " ")
        found = read_details(code.value[0], error.trailing_metadata())
        if code is not grpc.StatusCode.UNAVAILABLE or found is not None:
            said = found or ErrorDetails()
            return cls(code, message, field=said.field, retry_after=said.retry_after)
        # A server says UNAVAILABLE with details, also where it quotes what happened on a connection of its own. Without
        # them it was this connection.
        if advice := _tls_advice(message, shown):
            message = f"{address} is there, but no connection came about: {advice}"
            return cls(code, message, misconfigured=shown.uses_tls)
        if message.startswith(_UNREACHABLE):
            return cls(code, message, unreachable=address)
        if _REFUSED in message:
            return cls(
                code,
                f"{address} keeps no more calls of one connection open (--max-streams-per-connection); this one was "
                "not begun, try again",
            )
        return cls(code, f"the connection to {address} broke ({message}); try again")


def _tls_advice(message: str, shown: Credentials) -> str:
    """Return the likely TLS mistake between two that were connected and could not talk; empty if it was another."""
    if not message.startswith(_UNREACHABLE):
        return ""
    if why := _REJECTED_BY_US.search(message):
        if why[0] == "Hostname Verification Check failed":
            return "its certificate is for another name"
        trusted = f"in {shown.tls_ca} (tls_ca)" if shown.tls_ca is not None else "that is publicly known"
        return f"its certificate is not of an authority {trusted}, or it speaks no TLS"
    if _REJECTED_BY_THEM.search(message) is None:
        return ""
    if not shown.uses_tls:
        return "does it expect TLS? Give tls_ca, or tls for a public authority"
    if shown.tls_cert is None:
        return "does it ask clients for a certificate? Give tls_cert and tls_key"
    return f"does it trust the authority of {shown.tls_cert} (tls_cert)?"
