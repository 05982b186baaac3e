"""Connections of the upstream end of a link: plaintext or TLS, and the credentials that it shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from scalellm.services.common.lifecycle import CHANNEL_OPTIONS
from scalellm.services.common.link_token import read_token
from scalellm.services.common.tls import TlsFiles, channel_credentials


@dataclass(frozen=True, slots=True)
class LinkDialer:
    """Opens connections to other services. Its files are read again for every connection.

    Attributes:
        tls: TLS files; without files: plaintext.
        tls_name: Expected name in the peer's certificate, if it is not the address.
        token_file: File with the link token.
    """

    tls: TlsFiles = field(default_factory=TlsFiles)
    tls_name: str = ""
    token_file: Path | None = None

    def open_channel(self, address: str) -> grpc.aio.Channel:
        """Connect. Raises ConfigFileError."""
        credentials = channel_credentials(self.tls)
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        name = (("grpc.ssl_target_name_override", self.tls_name),) if self.tls_name else ()
        return grpc.aio.secure_channel(address, credentials, options=(*CHANNEL_OPTIONS, *name))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of every call. Raises ConfigFileError."""
        if self.token_file is None:
            return ()
        return (("authorization", f"Bearer {read_token(self.token_file)}"),)

    def check(self) -> None:
        """Raise ConfigFileError if the files cannot be used for a connection."""
        self.metadata()
        channel_credentials(self.tls)


PLAINTEXT = LinkDialer()
"""A dialer without TLS and token, for a loopback interface."""
