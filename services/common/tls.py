"""TLS of listeners and links, with PEM files that are read again when they change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from scalellm.services.common.reload import ConfigFileError, Reloaded, read_file


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of one end of a connection.

    Attributes:
        cert: Its certificate, followed by intermediate ones.
        key: The certificate's private key, not encrypted.
        ca: Certificates of the authorities that it trusts. On a listener, clients must then have a certificate of one
            of them (mutual TLS).
        option: Beginning of the options that name the files, for messages: `--tls`.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    option: str = "--tls"

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the paths of the configured files."""
        return tuple(path for path in (self.cert, self.key, self.ca) if path is not None)

    def read(self) -> TlsMaterial:
        """Read and check all files. Raises ConfigFileError."""
        if (self.cert is None) != (self.key is None):
            missing = "key" if self.key is None else "cert"
            raise ConfigFileError(f"{self.option}-{missing}: is missing: a certificate and its key are given together")
        material = TlsMaterial(
            cert=read_file(self.cert, f"{self.option}-cert") if self.cert is not None else None,
            key=read_file(self.key, f"{self.option}-key") if self.key is not None else None,
            ca=read_file(self.ca, f"{self.option}-ca") if self.ca is not None else None,
        )
        self._check(material)
        return material

    def read_for_listener(self) -> TlsMaterial:
        """Read and check all files of a listener. Raises ConfigFileError."""
        if self.cert is None and self.key is None:
            raise ConfigFileError(f"{self.option}-cert: is missing: a listener has to show a certificate")
        return self.read()

    def _check(self, material: TlsMaterial) -> None:
        """Check the files, because gRPC's errors about invalid ones name neither the file nor the reason."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self.cert is not None and self.key is not None:
            try:
                context.load_cert_chain(self.cert, self.key, password=_refuse_password)
            except ssl.SSLError as error:
                why = (
                    "they do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "not PEM, or encrypted"
                )
                raise ConfigFileError(
                    f"{self.option}-cert, {self.option}-key: {self.cert} and {self.key} cannot be used: {why}"
                ) from None
        if material.ca is not None:
            try:
                context.load_verify_locations(cadata=material.ca.decode("ascii"))
            except (ssl.SSLError, UnicodeDecodeError):
                raise ConfigFileError(f"{self.option}-ca: {self.ca} holds no PEM certificate") from None


PLAINTEXT = TlsFiles()
"""No files."""


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """The contents of TlsFiles."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials | None:
    """Return the credentials of a listener; None without files: plaintext.

    The files are checked at every handshake, so new connections get the current certificate and open ones keep theirs.
    Raises ConfigFileError.
    """
    if not files.paths:
        return None
    material = Reloaded(files.paths, files.read_for_listener)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return _configuration(material.value) if material.refresh() else None

    return grpc.dynamic_ssl_server_credentials(
        _configuration(material.value), fetch, require_client_authentication=files.ca is not None
    )


def server_context(files: TlsFiles) -> Reloaded[ssl.SSLContext] | None:
    """Return the TLS context of a listener that is not gRPC's; `refresh` it before each handshake. Raises
    ConfigFileError.
    """
    if not files.paths:
        return None

    def load() -> ssl.SSLContext:
        files.read_for_listener()
        assert files.cert is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.cert, files.key, password=_refuse_password)
        if files.ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(files.ca)
        return context

    return Reloaded(files.paths, load)


def listener_context(files: TlsFiles) -> ssl.SSLContext | None:
    """Return the TLS context of a listener that keeps one context, in which each handshake checks the files by itself.

    Raises ConfigFileError.
    """
    reloaded = server_context(files)
    if reloaded is None:
        return None

    def on_handshake(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        reloaded.refresh()
        connection.context = reloaded.value

    outer = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    outer.verify_mode = reloaded.value.verify_mode
    outer.options |= ssl.OP_NO_TICKET  # a resumed session would keep the authorities from its beginning
    outer.num_tickets = 0
    outer.sni_callback = on_handshake  # called without a name, too
    return outer


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials | None:
    """Return the credentials of a new connection, read now; None without files: plaintext. Raises ConfigFileError."""
    if not files.paths:
        return None
    material = files.read()
    return grpc.ssl_channel_credentials(material.ca, material.key, material.cert)


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(((material.key, material.cert),), material.ca)


def _refuse_password() -> str:
    # Without this callback OpenSSL would ask for a password on the terminal.
    return ""
