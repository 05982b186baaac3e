"""What a client has received of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.v1.generation_pb2 import Finished, GenerateResponse, Started


class Received:
    """How far an answer was received: enough to go on with it by `resume`.

    Attributes:
        started: The first message; None before it came.
        finished: The last message, with finish reasons, usage and latency; None before it came.
        offsets: Tokens received of each sample, by index, those before a resume included.
    """

    def __init__(self, offsets: Sequence[int] = ()) -> None:
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.offsets = list(offsets)

    def take(self, response: GenerateResponse) -> None:
        """Note one message of the answer."""
        match response.WhichOneof("event"):
            case "started":
                self.started = response.started
            case "delta":
                delta = response.delta
                self.offsets += [0] * (delta.index + 1 - len(self.offsets))
                self.offsets[delta.index] = delta.offset + delta.num_tokens
            case "finished":
                self.finished = response.finished
