"""The requests and their times: everything follows from a seed, and is the same for every target."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WorkloadName = Literal["fixed", "chat", "shared", "sessions", "json", "edits"]

JSON_SCHEMA = (
    '{"type": "array", "minItems": 4096, "items": {"type": "object", "additionalProperties": false, '
    '"required": ["name", "tags", "age", "active"], "properties": {"name": {"type": "string", "maxLength": 40}, '
    '"tags": {"type": "array", "maxItems": 3, "items": {"enum": ["red", "green", "blue"]}}, '
    '"age": {"type": "integer", "minimum": 0, "maximum": 120}, "active": {"type": "boolean"}}}}'
)
"""Schema of the answers of the workload `json`: records without an end, to be as long as those of `fixed`."""

# Spread of the chat mix's lengths: the natural logarithm's standard deviation. About what public chat logs show: the
# 90th percentile is four times the median for prompts and three times for answers.
_INPUT_SIGMA, _OUTPUT_SIGMA = 1.1, 0.9

_EDIT_EVERY = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of prompts and answers.

    Attributes:
        workload: `fixed`: every prompt and answer as long as stated. `chat`: log-normal lengths with the stated ones as
            medians. `shared`: fixed, after a prefix that all prompts of a step share. `sessions`: conversations of
            `turns` turns, each a fixed message and answer. `json`: fixed, and answers are JSON of `JSON_SCHEMA`.
            `edits`: fixed, each prompt a text and the beginning of the same text with some tokens changed, which models
            go on with.
        input_len: Prompt tokens, without a shared prefix or history.
        output_len: Tokens generated.
        max_len: The chat mix is cut where prompt and answer together are longer.
        prefix_len: Tokens of the shared prefix.
        turns: Turns of a session.
        think_s: Mean seconds between a session's answer and its next message (exponential).
        cancel_share: Share of requests that the client cancels, each after a number of tokens drawn evenly from 1 to
            one less than it asked for.
    """

    workload: WorkloadName = "fixed"
    input_len: int = 128
    output_len: int = 128
    max_len: int = 4096
    prefix_len: int = 512
    turns: int = 4
    think_s: float = 0.0
    cancel_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation, `think_s` seconds after the answer before it."""

    token_ids: tuple[int, ...]
    output_len: int
    think_s: float = 0.0
    cancel_after: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow one another; a single raw prompt unless it is a session."""

    number: int
    turns: tuple[Turn, ...]
    is_session: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """The load: `concurrency` requests at any time (closed loop), or `rate` a second, whatever comes back (open loop,
    Poisson). Sessions count as one from their first turn to their last. Exactly one of the two is set.
    """

    concurrency: int | None = None
    rate: float | None = None

    @classmethod
    def parse(cls, text: str) -> Load:
        """`8`: eight at once. `2.5/s`: at this rate. ValueError for anything else."""
        number, per_second = text.strip().removesuffix("/s"), text.strip().endswith("/s")
        try:
            load = cls(rate=float(number)) if per_second else cls(concurrency=int(number))
        except ValueError:
            load = cls()
        value = load.rate if per_second else load.concurrency
        if value is None or not 0 < value < math.inf:
            raise ValueError(f"{text!r} is no load: 8 is eight requests at once, 2.5/s a rate")
        return load

    def __str__(self) -> str:
        return f"{self.rate:g}/s" if self.rate is not None else str(self.concurrency)


def conversations(shape: Shape, alphabet: Sequence[int], num_requests: int, seed: str) -> list[Conversation]:
    """At least `num_requests` requests, of token ids out of `alphabet`; the same for the same arguments.

    No two prompts share a beginning but for the shared prefix and a session's history.
    """
    draw = {name: random.Random(f"{seed}/{name}") for name in ("lengths", "tokens", "cancel", "think")}
    prefix = tuple(draw["tokens"].choices(alphabet, k=shape.prefix_len)) if shape.workload == "shared" else ()
    num_turns = shape.turns if shape.workload == "sessions" else 1

    def turn(place: int) -> Turn:
        input_len, output_len = _lengths(shape, draw["lengths"])
        token_ids = (*prefix, *draw["tokens"].choices(alphabet, k=input_len))
        if shape.workload == "edits":
            token_ids = _with_edit(token_ids, alphabet, draw["tokens"])
        cancelled = draw["cancel"].random() < shape.cancel_share and output_len > 1
        cancel_after = draw["cancel"].randint(1, output_len - 1) if cancelled else None
        think_s = draw["think"].expovariate(1 / shape.think_s) if place and shape.think_s else 0.0
        return Turn(token_ids, output_len, think_s, cancel_after)

    return [
        Conversation(number, tuple(turn(place) for place in range(num_turns)), shape.workload == "sessions")
        for number in range(math.ceil(num_requests / num_turns))
    ]


def arrival_times(rate: float, count: int, seed: str) -> list[float]:
    """Seconds after the start at which `count` conversations of a Poisson process begin."""
    draw = random.Random(f"{seed}/arrivals")
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += draw.expovariate(rate)
        times.append(now)
    return times


def digest(planned: Sequence[Conversation]) -> str:
    """Names the prompts and lengths: runs with the same one sent the same."""
    hashed = hashlib.sha256()
    for conversation in planned:
        hashed.update(repr(conversation).encode())
    return hashed.hexdigest()[:16]


def _with_edit(token_ids: Sequence[int], alphabet: Sequence[int], draw: random.Random) -> tuple[int, ...]:
    """Return the first three quarters of a text, and behind them their beginning with one token of `_EDIT_EVERY`
    changed, of the same length in all.
    """
    text = token_ids[: -(-3 * len(token_ids) // 4)]
    edited = [token if (place + 1) % _EDIT_EVERY else draw.choice(alphabet) for place, token in enumerate(text)]
    return (*text, *edited[: len(token_ids) - len(text)])


def _lengths(shape: Shape, draw: random.Random) -> tuple[int, int]:
    if shape.workload != "chat":
        return shape.input_len, shape.output_len
    input_len = round(draw.lognormvariate(math.log(shape.input_len), _INPUT_SIGMA))
    output_len = round(draw.lognormvariate(math.log(shape.output_len), _OUTPUT_SIGMA))
    input_len = min(max(1, input_len), shape.max_len - 1)
    return input_len, min(max(1, output_len), shape.max_len - input_len)
