"""Credentials of a client, and the authorities that it trusts."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

Options = Sequence[tuple[str, int]]


class CredentialsError(Exception):
    """A file cannot be read, or something is missing; the message is one line that says what."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Credentials that a server may ask for. Nothing given: plaintext, and no key.

    Attributes:
        api_key: As `scalellm keys create` printed it.
        tls_ca: PEM file with the authorities of servers; turns TLS on.
        tls_cert: PEM file with a certificate to show, for a server that asks for one.
        tls_key: PEM file with its private key.
        tls_name: Name in the server's certificate, where it is not the host of the address.
        tls: True turns TLS on also without `tls_ca`: with the public authorities that gRPC knows.
    """

    api_key: str = field(default="", repr=False)
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_name: str = ""
    tls: bool = False

    @property
    def uses_tls(self) -> bool:
        """True if connections are encrypted."""
        return self.tls or self.tls_ca is not None

    def open_channel(self, address: str, options: Options) -> grpc.Channel:
        """Connect to host:port. Raises CredentialsError."""
        secure = self._channel_credentials()
        if secure is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, secure, options=[*options, *self._name_option()])

    def open_async_channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """Connect to host:port, for asyncio. Raises CredentialsError."""
        secure = self._channel_credentials()
        if secure is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, secure, options=[*options, *self._name_option()])

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the same for a connection that is not gRPC's; None without TLS. Raises CredentialsError."""
        if not self.uses_tls:
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
        """Metadata of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def _channel_credentials(self) -> grpc.ChannelCredentials | None:
        if not self.uses_tls:
            if self.tls_cert is not None or self.tls_key is not None:
                raise CredentialsError("neither tls nor tls_ca is given: a certificate is shown over TLS only")
            return None
        if (self.tls_cert is None) != (self.tls_key is None):
            raise CredentialsError("tls_cert and tls_key are given together")
        ca, key, cert = (_read(path) for path in (self.tls_ca, self.tls_key, self.tls_cert))
        return grpc.ssl_channel_credentials(ca, key, cert)

    def _name_option(self) -> list[tuple[str, str]]:
        return [("grpc.ssl_target_name_override", self.tls_name)] if self.tls_name else []


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError as error:
        raise CredentialsError(f"cannot read {path}: {error.strerror}") from None


NO_CREDENTIALS = Credentials()
