"""The table of rules for a request's fields: names, ranges, defaults and limits.

The edge, the engine, HTTP and the command line use it, so each rule is stated only here. Clients find the same rules in
the comments of `protos/scalellm/v1`, which a test compares with the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Number = int | float
"""A value of a numeric field. A bool is an int."""


@dataclass(frozen=True, slots=True)
class NumberRule:
    """The rule of a field with one number or boolean.

    Attributes:
        name: Name of the field in the protos.
        kind: int, float or bool.
        meaning: Its effect, for users.
        default: Its value if it is not set; None: it has no default.
        low: Least value; None: a boolean, which has no range.
        high: Largest value; None: the largest of its type on the wire.
        is_above_low: True if `low` itself is excluded.
        is_model_default: True if a model's generation_config.json may define another default.
    """

    name: str
    kind: type[Number]
    meaning: str = ""
    default: Number | None = None
    low: Number | None = None
    high: Number | None = None
    is_above_low: bool = False
    is_model_default: bool = False

    @property
    def interval(self) -> str:
        """The range, such as "(0, 1]" or "at least 1"; empty without one."""
        if self.low is None:
            return ""
        if self.high is None:
            return f"at least {_shown(self.low)}"
        return f"{'(' if self.is_above_low else '['}{_shown(self.low)}, {_shown(self.high)}]"

    @property
    def limits(self) -> str:
        """The range and the default, as text for documentation."""
        default = "" if self.default is None else f"default {_shown(self.default)}"
        return ", ".join(part for part in (self.interval, default) if part)

    def fault(self, value: Number) -> str:
        """Return the requirement that a value violates; empty if it is valid. NaN is out of every range."""
        if self.low is None:
            return ""
        is_high_enough = value > self.low if self.is_above_low else value >= self.low
        if is_high_enough and (self.high is None or value <= self.high):
            return ""
        return f"must be {'in ' if self.high is not None else ''}{self.interval}, got {_shown(value)}"


@dataclass(frozen=True, slots=True)
class ListRule:
    """The rule of a field with several entries: their number, and the range of the number in each.

    Attributes:
        name: Name of the field in the protos.
        most: The most entries.
        least: The fewest entries.
        entry: The rule of each entry's number, if that has a range.
    """

    name: str
    most: int
    least: int = 0
    entry: NumberRule | None = None

    @property
    def limits(self) -> str:
        """The least and most entries, as text for documentation."""
        return f"{self.least} to {self.most} entries" if self.least else f"at most {self.most} entries"

    def fault(self, values: Sized) -> str:
        """Return the required and the actual number of entries if the rule is violated; else empty."""
        return "" if self.least <= len(values) <= self.most else f"must have {self.limits}, got {len(values)}"

    def entry_fault(self, value: Number) -> str:
        """Return the requirement that an entry's number violates; empty if it is valid."""
        return "" if self.entry is None else self.entry.fault(value)


def sampling_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each sampling field with an invalid value, and the requirement that it violates.

    Args:
        values: Values of the fields, by name. A field that is missing or None is not set.
    """
    rules: Mapping[str, NumberRule | ListRule] = {**SAMPLING, **SAMPLING_LISTS}
    for name, rule in rules.items():
        if (value := values.get(name)) is not None and (fault := rule.fault(value)):
            yield name, fault
    fewest, most = values.get("min_tokens") or 0, values.get("max_tokens")
    if most is not None and fewest > most:
        yield "min_tokens", f"must be at most max_tokens ({most}), got {fewest}"


def _shown(value: Number) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _numbers(*rules: NumberRule) -> Mapping[str, NumberRule]:
    return MappingProxyType({rule.name: rule for rule in rules})


def _lists(*rules: ListRule) -> Mapping[str, ListRule]:
    return MappingProxyType({rule.name: rule for rule in rules})


MAX_N = 16
"""Most samples of a request."""

MAX_LOGPROBS = 20
"""Most alternatives of a token whose log-probabilities can be requested."""

SAMPLING = _numbers(
    NumberRule("n", int, "Independent samples of the same prompt.", 1, low=1, high=MAX_N),
    NumberRule("max_tokens", int, "Most tokens to generate; not set: what the context holds.", low=1),
    NumberRule("min_tokens", int, "Do not end before this many tokens.", 0, low=0),
    NumberRule(
        *("temperature", float, "0: the most likely token each time; more: less likely ones as well.", 1.0),
        low=0.0,
        high=100.0,
        is_model_default=True,
    ),
    NumberRule("top_k", int, "Keep the k most likely tokens; 0: all.", 0, low=0, is_model_default=True),
    NumberRule(
        *("top_p", float, "Keep the likeliest tokens that make up p together.", 1.0),
        low=0.0,
        high=1.0,
        is_above_low=True,
        is_model_default=True,
    ),
    NumberRule(
        *("min_p", float, "Drop tokens less likely than min_p times the likeliest one.", 0.0),
        low=0.0,
        high=1.0,
        is_model_default=True,
    ),
    NumberRule(
        *("presence_penalty", float, "Above 0: avoid tokens that were generated before.", 0.0), low=-2.0, high=2.0
    ),
    NumberRule(
        *("frequency_penalty", float, "Above 0: avoid tokens the more, the more often they were generated.", 0.0),
        low=-2.0,
        high=2.0,
    ),
    NumberRule(
        *("repetition_penalty", float, "Above 1: avoid tokens that were read or generated before.", 1.0),
        low=0.0,
        high=2.0,
        is_above_low=True,
        is_model_default=True,
    ),
    NumberRule("seed", int, "The same seed repeats the same answer.", low=0, high=2**64 - 1),
    NumberRule("ignore_eos", bool, "Go on after the model's end token.", False),
    NumberRule("logprobs", int, "Tell log-probabilities, and this many alternatives.", low=0, high=MAX_LOGPROBS),
    NumberRule("prompt_logprobs", int, "Tell the same of the prompt's tokens.", low=0, high=MAX_LOGPROBS),
)
"""Fields of SamplingParams that hold one value."""

SAMPLING_LISTS = _lists(
    ListRule("logit_bias", 1024, entry=NumberRule("bias", float, low=-100.0, high=100.0)),
    ListRule("stop_token_ids", 64),
)
"""Fields of SamplingParams that hold several values."""

MAX_PREDICTION = 2**16
"""Most bytes of a prediction, and most of its tokens."""

MAX_STRUCTURE_BYTES = 2**16
"""Most bytes of a StructuredOutput."""

MAX_SCHEMA_DEPTH = 64
"""Most levels of nested objects and lists in a JSON Schema."""

STRUCTURE_LISTS = _lists(
    ListRule("choice.texts", 1024, least=1),
    ListRule("structural_tag.structures", 64, least=1),
    ListRule("structural_tag.triggers", 64, least=1),
)
"""Fields of StructuredOutput that hold several values."""

CHAT_LISTS = _lists(ListRule("tools", 128), ListRule("messages.tool_calls", 128))
"""Fields of Chat, and of its messages, that hold several values."""

MIN_PRIORITY = -100
"""The most urgent priority."""

REQUEST = _numbers(
    NumberRule("priority", int, "Lower runs first.", 0, low=MIN_PRIORITY, high=100),
    NumberRule("stream_interval", int, "Least tokens per message after the first.", 1, low=1, high=1024),
)
"""Fields of GenerateRequest that hold a number."""
