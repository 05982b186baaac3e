"""Targets of the load."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from bench.load.records import Ended, Request, Tokens


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """A server's description of itself.

    Attributes:
        model: Name of the model that answers.
        version: The server's version; empty where it does not say.
        vocab_size: Vocab size of the model; None where it does not say.
    """

    model: str
    version: str = ""
    vocab_size: int | None = None


class Target(Protocol):
    """One server. Used from one event loop; close it."""

    takes_token_ids: bool
    """Raw prompts are sent as token ids; otherwise as text."""

    async def info(self) -> TargetInfo:
        """Ask the server. Raises RequestError when nobody answers, or not in the expected way."""

    async def connect(self, num_streams: int) -> None:
        """Open the connections that so many streams at once will use. What fails here shows when requests are sent.

        Between a step's start and its first tokens there is then no handshake, whatever the protocol.
        """

    def stream(self, request: Request) -> AsyncGenerator[Tokens | Ended]:
        """Send a request: messages with tokens as they come, then Ended. Closing the generator early cancels it.

        Raises RequestError while iterating.
        """

    async def close(self) -> None:
        """Close all connections."""


class UsageError(Exception):
    """A request does not fit the target; the message names the option and the limit."""
