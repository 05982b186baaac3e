"""Sampling parameters of a request, and the error that refuses a request."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

from scalellm.services.common.field_rules import SAMPLING, SAMPLING_LISTS, sampling_faults


class InvalidRequestError(ValueError):
    """A request that cannot be served: `field` is at fault, `message` names the limit."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def _default(name: str) -> Any:
    return SAMPLING[name].default


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters; the meaning and the default of each field are those of `scalellm.v1.SamplingParams`.

    `max_tokens` None generates up to the model's context; `top_k` 0 is off; `seed` None lets the engine draw one;
    `logprobs` k reports the sampled token and the k most likely ones, None nothing.
    """

    n: int = _default("n")
    max_tokens: int | None = _default("max_tokens")
    min_tokens: int = _default("min_tokens")
    temperature: float = _default("temperature")
    top_k: int = _default("top_k")
    top_p: float = _default("top_p")
    min_p: float = _default("min_p")
    presence_penalty: float = _default("presence_penalty")
    frequency_penalty: float = _default("frequency_penalty")
    repetition_penalty: float = _default("repetition_penalty")
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = _default("seed")
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = _default("ignore_eos")
    logprobs: int | None = _default("logprobs")
    prompt_logprobs: int | None = _default("prompt_logprobs")

    @property
    def has_penalties(self) -> bool:
        """True if earlier tokens change the logits, by any of the penalties."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def validate(self, vocab_size: int, max_logprobs: int) -> None:
        """Raise InvalidRequestError naming the first field out of range; NaN is out of every range."""
        for name, fault in sampling_faults({name: getattr(self, name) for name in (*SAMPLING, *SAMPLING_LISTS)}):
            raise InvalidRequestError(name, fault)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and count > max_logprobs:
                raise InvalidRequestError(name, f"must be at most {max_logprobs} here, got {count}")
        for token_id, bias in self.logit_bias.items():
            _check_token_id("logit_bias", token_id, vocab_size)
            if fault := SAMPLING_LISTS["logit_bias"].entry_fault(bias):
                raise InvalidRequestError("logit_bias", fault)
        for token_id in self.stop_token_ids:
            _check_token_id("stop_token_ids", token_id, vocab_size)


def check_num_logit_bias(entries: Sized) -> None:
    """Raise InvalidRequestError if `logit_bias` has too many entries. Called before a mapping is made of them."""
    if fault := SAMPLING_LISTS["logit_bias"].fault(entries):
        raise InvalidRequestError("logit_bias", fault)


def _check_token_id(name: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise InvalidRequestError(name, f"token ids must be between 0 and {vocab_size - 1}, got {token_id}")
