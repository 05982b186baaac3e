"""Counts of messages and bytes on links."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LinkTraffic:
    """Messages and their bytes since start; frames that were merged count as one. Links of one kind may share it."""

    frames_sent: int = 0
    bytes_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0

    def on_sent(self, message: bytes) -> None:
        """A message was handed to the transport."""
        self.frames_sent += 1
        self.bytes_sent += len(message)

    def add(self, other: LinkTraffic) -> None:
        """Count what went over other links as well."""
        self.frames_sent += other.frames_sent
        self.bytes_sent += other.bytes_sent
        self.frames_received += other.frames_received
        self.bytes_received += other.bytes_received

    def on_received(self, message: bytes) -> None:
        """A message came."""
        self.frames_received += 1
        self.bytes_received += len(message)
