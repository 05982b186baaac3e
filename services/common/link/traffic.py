"""Counts of messages and bytes on links."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LinkTraffic:
    """Counts of messages and bytes since start. Merged frames count as one. Links of one kind may share an object."""

    frames_sent: int = 0
    bytes_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0

    def on_sent(self, message: bytes) -> None:
        """Count a message that was passed to the transport."""
        self.frames_sent += 1
        self.bytes_sent += len(message)

    def add(self, other: LinkTraffic) -> None:
        """Add the counts of other links."""
        self.frames_sent += other.frames_sent
        self.bytes_sent += other.bytes_sent
        self.frames_received += other.frames_received
        self.bytes_received += other.bytes_received

    def on_received(self, message: bytes) -> None:
        """Count a received message."""
        self.frames_received += 1
        self.bytes_received += len(message)
