"""Certificates of a test's own, as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme


@dataclass
class Identity:
    """A certificate, its key, and the authority that its owner trusts."""

    cert: Path
    key: Path
    ca: Path

    def flags(self, prefix: str = "tls", *, mutual: bool = False) -> list[str]:
        """Options of a listener (`tls`) or of a link (`link-tls`)."""
        pairs = {"cert": self.cert, "key": self.key}
        if mutual or prefix != "tls":
            pairs["ca"] = self.ca
        return [word for name, path in pairs.items() for word in (f"--{prefix}-{name}", str(path))]

    def channel_credentials(self, *, shows_certificate: bool = True) -> grpc.ChannelCredentials:
        own = (self.key.read_bytes(), self.cert.read_bytes()) if shows_certificate else (None, None)
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), *own)


def issue(folder: Path, authority: trustme.CA, *names: str) -> Identity:
    """Write a new certificate for `names` into the folder, over what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = Identity(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")
    issued = authority.issue_cert(*(names or ("localhost", "127.0.0.1")))
    identity.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    identity.key.write_bytes(issued.private_key_pem.bytes())
    identity.ca.write_bytes(authority.cert_pem.bytes())
    return identity
