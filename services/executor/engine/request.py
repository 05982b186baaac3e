"""The engine's requests and results: plain data, free of any wire format."""

import enum
from dataclasses import dataclass, field

from scalellm.services.executor.engine.sampling_params import SamplingParams

RequestKey = tuple[int, int]
"""(link, handle): unique among the requests that are in the engine."""


class FinishReason(enum.Enum):
    """The reason for which one sample ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token, or a stop string found by the text edge."""
    LENGTH = "length"
    """max_tokens or max_model_len was reached."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class AbortReason(enum.Enum):
    """The reason for which a request or a sample is ended from outside."""

    CANCELLED = "cancelled"
    STOP = "stop"
    DEADLINE = "deadline"


class RequestStatus(enum.Enum):
    """The status with which an accepted request ended."""

    OK = "ok"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    """A later attempt to run the same request came, by way of another scheduler."""
    MOVED = "moved"
    """The request was given back, to go on elsewhere or later."""
    DEADLINE_EXCEEDED = "deadline_exceeded"
    INVALID = "invalid"
    """The request's grammar cannot be followed."""
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class ResumedSample:
    """The output of one sample on another executor; with `finished` set it is counted but not run again."""

    index: int
    token_ids: tuple[int, ...]
    finished: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request. `deadline` is absolute on the engine's clock; requests with a lower `priority` run first.

    Cached prefixes are shared only between requests with the same `cache_salt`. Samples missing in `resumed` start from
    the prompt. `charged_tokens` are the credits that it took from its link, None for all of its prompt. `execution_id`
    is common to all attempts to run the request; the engine runs one attempt at a time, and a new one replaces it
    unless its number `attempt` is lower. Empty = there is one attempt only. `grammar` constrains each sample's text,
    empty = any text. `prediction_token_ids` is the answer that the caller expects: a correct prediction makes decoding
    faster, and none changes the answer.
    """

    key: RequestKey
    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    deadline: float | None = None
    cache_salt: bytes = b""
    resumed: tuple[ResumedSample, ...] = ()
    charged_tokens: int | None = None
    execution_id: bytes = b""
    attempt: int = 0
    grammar: str = ""
    prediction_token_ids: tuple[int, ...] = ()


class SupersededError(Exception):
    """A request is refused because a later attempt to run it is in the engine."""

    def __init__(self, attempt: int, running: int) -> None:
        super().__init__(f"attempt {attempt} of this request is out of date, attempt {running} runs")


TopLogprobs = list[tuple[int, float]]
"""(token id, natural-log probability) pairs, most likely first."""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """New tokens of a sample, the first of which is its token number `offset`. Lists are parallel to `token_ids`."""

    key: RequestKey
    index: int
    offset: int
    token_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of consecutive tokens of a sample or of a prompt, the first of which is at position `offset`.

    Each token has as many alternatives as were asked for (`num_top`), at most one per token of the vocabulary. The
    prompt's token at position 0 has no log-probability: its entry is 0 without alternatives. `index` is 0 for a prompt.
    """

    key: RequestKey
    index: int
    offset: int
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    num_top: int


@dataclass(frozen=True, slots=True)
class SampleFinish:
    """A sample ended; `stop_token_id` is the last token where that ended it (it is in the sample's token ids)."""

    key: RequestKey
    index: int
    reason: FinishReason
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a request consumed.

    `completion_tokens` counts all samples, stop tokens and resumed tokens included; `cached_tokens` is the part of
    the prompt found in the prefix cache when the request first ran; `num_resumed` came from another executor. Of its
    drafted tokens `accepted_drafts` were accepted and `rejected_drafts` were not.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    num_preemptions: int
    num_resumed: int
    accepted_drafts: int = 0
    rejected_drafts: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on the engine's clock. queue + prefill + decode + tail = total; `preempted` lies within them.

    queue: add to first step; prefill: first step to first token; decode: first to last token; tail: last token to
    the end (other than 0 only when the request was ended from outside).
    """

    total: float
    queue: float
    prefill: float
    decode: float
    preempted: float


@dataclass(frozen=True, slots=True)
class RequestFinish:
    """The end of a request, returned exactly once per accepted request."""

    key: RequestKey
    status: RequestStatus
    message: str
    usage: Usage
    timings: Timings
