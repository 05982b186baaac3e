"""One request, its answer, and the record of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as a target sends it.

    Attributes:
        token_ids: The new prompt tokens.
        text: The same as text; empty where no tokenizer was given and the target takes token ids.
        output_len: Tokens to generate.
        session_id: The conversation; None for a raw prompt of its own.
        history: Texts before `text`, user and assistant in turns, for servers that keep no sessions.
        stream: True if tokens are wanted as they come.
        deadline_s: Seconds that the server may take; None: no deadline.
    """

    token_ids: tuple[int, ...]
    text: str
    output_len: int
    session_id: str | None = None
    history: tuple[str, ...] = ()
    stream: bool = True
    deadline_s: float | None = None

    def messages(self) -> list[dict[str, str]]:
        """History and text in the shape of chat completions."""
        roles = ("user", "assistant")
        return [
            {"role": roles[place % 2], "content": content} for place, content in enumerate((*self.history, self.text))
        ]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One message with new tokens."""

    count: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The server's own account, at the end of a complete answer; None where it does not say.

    Attributes:
        prompt_tokens: Tokens of the prompt, as the server counts them.
        output_tokens: Tokens generated.
        cached_tokens: Prompt tokens that came from a prefix cache.
        breakdown: Latency breakdown, in nanoseconds by part.
    """

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    breakdown: dict[str, int] | None = None


class RequestError(Exception):
    """The request failed. `kind` is a short name to count by, the message says more."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class RequestRecord:
    """One request that was sent. Times in seconds after the step's start, on the generator's monotonic clock.

    Attributes:
        conversation: Number of the conversation, and
        turn: of the turn in it.
        input_len: Prompt tokens of this turn as planned.
        output_len: Tokens asked for.
        due: Time at which it was to be sent.
        sent: Time at which it was sent.
        ended: Time at which its last message, or its failure, had come.
        arrivals: Time at which each message with tokens came; empty when not streamed.
        counts: Tokens of each of these messages.
        status: Its status.
        kind: Name of the failure.
        message: More about it.
        server: The server's own report.
    """

    conversation: int
    turn: int
    input_len: int
    output_len: int
    due: float
    sent: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    status: Status = "ok"
    kind: str = ""
    message: str = ""
    server: Ended = field(default_factory=Ended)

    @property
    def input_tokens(self) -> int:
        """Prompt tokens as the server counts them; as planned where it does not say."""
        return self.input_len if self.server.prompt_tokens is None else self.server.prompt_tokens

    @property
    def output_tokens(self) -> int:
        """Tokens generated as the server counts them; messages' tokens where it does not say."""
        return sum(self.counts) if self.server.output_tokens is None else self.server.output_tokens

    @property
    def e2e(self) -> float:
        """Seconds from sending to the end."""
        return self.ended - self.sent

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first message with tokens."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def itls(self) -> list[float]:
        """Seconds between messages with tokens."""
        return [late - early for early, late in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first message."""
        later = self.output_tokens - self.counts[0] if self.counts else 0
        return (self.arrivals[-1] - self.arrivals[0]) / later if len(self.arrivals) > 1 and later > 0 else None

    def as_json(self) -> dict[str, Any]:
        """Plain values; arrivals as microseconds after sending."""
        plain = asdict(self)
        plain["arrivals_us"] = [round(1e6 * (arrival - self.sent)) for arrival in self.arrivals]
        del plain["arrivals"]
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> RequestRecord:
        """The record that `as_json` wrote, to the microsecond."""
        values = dict(plain)
        values["arrivals"] = [values["sent"] + 1e-6 * after for after in values.pop("arrivals_us")]
        values["server"] = Ended(**values["server"])
        return cls(**values)
