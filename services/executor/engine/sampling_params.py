"""How the tokens of a request are drawn, and the error that refuses a request."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_STOP_TOKEN_IDS = 64


class InvalidRequestError(ValueError):
    """A request that cannot be served: `field` is at fault, `message` names the limit."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; the meaning of each field is that of `scalellm.v1.SamplingParams`.

    `max_tokens` None generates up to the model's context; `top_k` 0 is off; `seed` None lets the engine draw one;
    `logprobs` k reports the sampled token and the k most likely ones, None nothing.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def validate(self, vocab_size: int, max_logprobs: int) -> None:
        """Raise InvalidRequestError naming the first field out of range; NaN is out of every range."""
        _check_int("n", self.n, 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                "min_tokens", f"must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 2.0, low_open=True)
        self._validate_token_ids(vocab_size)
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidRequestError("seed", f"must fit 64 bits, got {self.seed}")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= max_logprobs:
                raise InvalidRequestError(name, f"must be between 0 and {max_logprobs}, got {count}")

    def _validate_token_ids(self, vocab_size: int) -> None:
        check_num_logit_bias(len(self.logit_bias))
        for token_id, bias in self.logit_bias.items():
            _check_token_id("logit_bias", token_id, vocab_size)
            _check_range("logit_bias", bias, -100.0, 100.0)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                "stop_token_ids", f"must have at most {MAX_STOP_TOKEN_IDS} entries, got {len(self.stop_token_ids)}"
            )
        for token_id in self.stop_token_ids:
            _check_token_id("stop_token_ids", token_id, vocab_size)


def check_num_logit_bias(num_entries: int) -> None:
    """Raise InvalidRequestError when `logit_bias` has more than 1024 entries; before a mapping is made of them."""
    if num_entries > MAX_LOGIT_BIAS_ENTRIES:
        raise InvalidRequestError(
            "logit_bias", f"must have at most {MAX_LOGIT_BIAS_ENTRIES} entries, got {num_entries}"
        )


def _check_int(name: str, value: int, low: int) -> None:
    if value < low:
        raise InvalidRequestError(name, f"must be at least {low}, got {value}")


def _check_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = math.isfinite(value) and low <= value <= high and not (low_open and value == low)
    if not inside:
        raise InvalidRequestError(name, f"must be in {'(' if low_open else '['}{low:g}, {high:g}], got {value:g}")


def _check_token_id(name: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise InvalidRequestError(name, f"token ids must be between 0 and {vocab_size - 1}, got {token_id}")
