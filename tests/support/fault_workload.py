"""The requests of the streams under which a fault happens: of every kind, and drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from fault_streams import Stream
from prompts import PROMPTS
from scalellm.v1 import common_pb2, generation_pb2

KINDS = (
    *("plain", "samples", "logprobs", "session", "stop", "deadline", "cancel", "kept", "kept samples", "kept again"),
    *("shaped", "shaped samples"),
)
SHAPED = ("shaped", "shaped samples", "kept shaped")


class Workload:
    """Requests of every kind that follow from a seed.

    Args:
        seed: Seed of all random choices.
        count: Streams.
        longest: Most tokens of a sample.
        kinds: Kinds of streams, one after the other.
    """

    def __init__(self, seed: int, count: int = 64, longest: int = 900, kinds: Sequence[str] = KINDS) -> None:
        self.seed = seed
        self.kinds = tuple(kinds)
        self._count = count
        self._longest = longest
        self._stops: dict[int, str] = {}

    def streams(self, name: str, *, is_undisturbed: bool = False) -> list[Stream]:
        """New streams. Those of two names ask the same, but for the sessions that they are part of.

        Undisturbed ones run to their own ends: no deadlines, nobody goes away.
        """
        return [self._stream(number, name, is_undisturbed) for number in range(self._count)]

    def learn_stops(self, undisturbed: Sequence[Stream]) -> None:
        """Choose stop strings that occur, from texts that came without any; of a text without words, none."""
        for stream in undisturbed:
            if stream.kind == "stop":
                text, half = stream.texts[0], len(stream.texts[0]) // 2
                words = (text[start : start + 6] for start in range(half, len(text) - 6))
                if (word := next((word for word in words if word.isascii()), None)) is not None:
                    self._stops[stream.number] = word

    def _stream(self, number: int, name: str, is_undisturbed: bool) -> Stream:
        rng = random.Random(f"stream {self.seed} {number}")
        kind = self.kinds[number % len(self.kinds)]
        sampling = common_pb2.SamplingParams(
            max_tokens=rng.randint(self._longest // 3, self._longest),
            temperature=rng.choice((0.0, 0.9)),
            seed=rng.getrandbits(32),
            ignore_eos=True,
        )
        request = generation_pb2.GenerateRequest(
            sampling=sampling,
            output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS,
            stream_interval=rng.choice((4, 8, 16)),
        )
        stream = Stream(number, kind, request)
        prompt = f"{number}. {rng.choice(PROMPTS)}"
        if kind == "session":
            request.session_id = f"{name}-{number}"
            request.chat.messages.add(role="user", content="And then?")
            stream.first_turn = generation_pb2.GenerateRequest(session_id=request.session_id)
            stream.first_turn.chat.messages.add(role="user", content=prompt)
            stream.first_turn.sampling.CopyFrom(sampling)
            stream.first_turn.sampling.max_tokens = 16
        else:
            request.prompt = prompt
        if "shaped" in kind:
            sampling.ignore_eos = request.sampling.ignore_eos = False
            request.structured_output.CopyFrom(_shape(rng, sampling.max_tokens))
        if kind.startswith("kept"):
            request.on_disconnect = generation_pb2.ON_DISCONNECT_KEEP
        if kind == "kept again":
            request.request_id = f"{name}-{number}"
        if kind.endswith("samples"):
            sampling.n = request.sampling.n = rng.randint(2, 4)
            request.sampling.max_tokens = sampling.max_tokens // 2
        elif kind == "logprobs":
            request.sampling.logprobs = 2
        elif kind == "stop" and number in self._stops:
            request.stop.append(self._stops[number])
        if not is_undisturbed:
            if kind == "deadline":
                stream.timeout = rng.uniform(1, 6)
            elif kind in ("cancel", "kept again"):
                stream.cancel_after = rng.randint(1, sampling.max_tokens)
                stream.asks_again = kind == "kept again"
        return stream


def _shape(rng: random.Random, max_tokens: int) -> generation_pb2.StructuredOutput:
    """Return a shape whose texts take about `max_tokens` tokens of the fake engine: some fit, some do not."""
    if rng.random() < 0.5:
        words = max_tokens // 4
        return generation_pb2.StructuredOutput(regex=f"([a-z]{{2,9}} ){{{words},{words * 2}}}the end")
    item = {
        "type": "object",
        "required": ["id", "kind", "ok"],
        "additionalProperties": False,
        "properties": {
            "id": {"type": "integer", "minimum": 0, "maximum": 99999},
            "kind": {"enum": ["leaf", "tree", None]},
            "ok": {"type": "boolean"},
        },
    }
    items = max(1, max_tokens // 40)
    schema = {"type": "array", "minItems": items, "maxItems": items + 2, "items": item}
    return generation_pb2.StructuredOutput(json_schema=json.dumps(schema))
