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

    def on_received(self, message: bytes) -> None:
        """A message came."""
        self.frames_received += 1
        self.bytes_received += len(message)
