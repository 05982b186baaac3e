"""How a client proves itself, and whom it trusts."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc


class CredentialsError(Exception):
    """A file cannot be read, or something is missing; the message is one line that says what."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a server may ask for. Nothing given: plaintext, and no key.

    Attributes:
        api_key: As `scalellm keys create` printed it.
        tls_ca: PEM file with the authorities of servers; turns TLS on.
        tls_cert: PEM file with a certificate to show, for a server that asks for one.
        tls_key: PEM file with its private key.
        tls_name: Name in the server's certificate, where it is not the host of the address.
    """

    api_key: str = field(default="", repr=False)
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_name: str = ""

    def open_channel(self, address: str, options: Sequence[tuple[str, int]]) -> grpc.Channel:
        """Connect to host:port. Raises CredentialsError."""
        if self.tls_ca is None:
            if self.tls_cert is not None or self.tls_key is not None:
                raise CredentialsError("--tls-ca is missing: a certificate is shown over TLS only")
            return grpc.insecure_channel(address, options=options)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise CredentialsError("--tls-cert and --tls-key are given together")
        ca, key, cert = (_read(path) for path in (self.tls_ca, self.tls_key, self.tls_cert))
        name = [("grpc.ssl_target_name_override", self.tls_name)] if self.tls_name else []
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=[*options, *name])

    def tls_context(self) -> ssl.SSLContext | None:
        """The same for a connection that is not gRPC's; None without TLS. Raises CredentialsError."""
        if self.tls_ca is None:
            return None
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
            if self.tls_cert is not None:
                context.load_cert_chain(self.tls_cert, self.tls_key)
        except OSError as error:
            files = ", ".join(str(path) for path in (self.tls_ca, self.tls_cert, self.tls_key) if path is not None)
            raise CredentialsError(f"cannot use {files}: {error.strerror or error}") from None
        return context

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call says."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError as error:
        raise CredentialsError(f"cannot read {path}: {error.strerror}") from None


NO_CREDENTIALS = Credentials()
