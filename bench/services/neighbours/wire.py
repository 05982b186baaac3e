"""Messages of the protos, put together from serialised parts: a request costs a concatenation."""

from __future__ import annotations

import json
import random
import time

from scalellm.v1 import common_pb2, generation_pb2, link_pb2, tokenizer_pb2

# Tokens that say when they were sent: one of 40,000 ids per 25 us, so a second until they repeat. All are ordinary
# tokens of every vocabulary that is used here.
_TICK_NS, _NUM_STAMPS, _FIRST_STAMP = 25_000, 40_000, 1_000

STAMPED = 16
"""One stream in this many asks for token ids, which say how old they are."""

_SUBMIT = link_pb2.ClientFrame.SUBMIT_FIELD_NUMBER
_WORDS = (
    "the of and to in that it was he for on are as with they be at one have this from or had by hot but some what "
    "there we can out other were all your when up use word how said an each she which do their time if will way about "
    "many then them would write like so these her long make thing see him two has look more day could go come did my "
    "sound no most number who over know water than call first people may down side been now find throughput "
    "serialisation quarrelsome photosynthesis counterintuitive 1789 3.14159 naïve café Schrödinger's don't (perhaps) "
)


def stamp_now() -> int:
    """A token id that says when it was sent."""
    return _FIRST_STAMP + time.monotonic_ns() // _TICK_NS % _NUM_STAMPS


def age(stamp: int) -> float:
    """Seconds since `stamp_now` gave this token id; less than one."""
    return (stamp_now() - stamp) % _NUM_STAMPS * _TICK_NS / 1e9


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _token_ids(count: int) -> list[int]:
    rng = random.Random(count)
    return [rng.randrange(1_000, 41_000) for _ in range(count)]


def text_of(num_words: int) -> str:
    """About as many tokens as words."""
    rng, words = random.Random(num_words), _WORDS.split()
    return " ".join(rng.choice(words) for _ in range(num_words))


def unique_ids(number: int) -> list[int]:
    """Two token ids that no other request begins with: no prefix is shared."""
    return [1_000 + number % 40_000, 1_000 + number // 40_000]


def _sampling(max_tokens: int) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(n=1, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=1)


class SubmitFrames:
    """ClientFrames with prompts of `prompt_len` tokens, at least two, each different from its first block on."""

    def __init__(self, prompt_len: int) -> None:
        rest = link_pb2.Submit(request_id="req-0123456789abcdef", cache_salt=b"0123456789abcdef", traceparent="")
        self._rest = rest.SerializeToString()
        # Repeated fields of concatenated messages follow one another: the unique tokens come first.
        self._prompt = link_pb2.Submit(token_ids=_token_ids(max(0, prompt_len - 2))).SerializeToString()

    def make(self, handle: int, number: int, max_tokens: int, session_id: str = "") -> bytes:
        """Request `number`, as a serialised ClientFrame."""
        head = link_pb2.Submit(
            handle=handle, token_ids=unique_ids(number), sampling=_sampling(max_tokens), session_id=session_id
        )
        return _field(_SUBMIT, head.SerializeToString() + self._prompt + self._rest)


class GenerateRequests:
    """GenerateRequests with prompts of `prompt_len` tokens (at least two) or words."""

    def __init__(self, prompt_len: int, *, text: bool) -> None:
        self._text = text_of(max(1, prompt_len - 1)) if text else None
        self._prompt = generation_pb2.TokenIds(ids=_token_ids(max(0, prompt_len - 2))).SerializeToString()

    def make(self, number: int, max_tokens: int, *, stamps: bool) -> bytes:
        """Request `number`; with `stamps` its deltas carry token ids beside the text."""
        output = generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS if stamps else generation_pb2.OUTPUT_TEXT
        request = generation_pb2.GenerateRequest(sampling=_sampling(max_tokens), output=output)
        if self._text is not None:
            request.prompt = f"{number} {self._text}"
            return request.SerializeToString()
        head = generation_pb2.TokenIds(ids=unique_ids(number)).SerializeToString()
        tokens = _field(generation_pb2.GenerateRequest.TOKENS_FIELD_NUMBER, head + self._prompt)
        return request.SerializeToString() + tokens


class CompletionRequests:
    """Requests like those of `GenerateRequests`, for /v1/completions, as whole HTTP requests."""

    def __init__(self, prompt_len: int, *, text: bool) -> None:
        self._text = text_of(max(1, prompt_len - 1)) if text else None
        self._prompt = _token_ids(max(0, prompt_len - 2))

    def make(self, number: int, max_tokens: int, *, stamps: bool) -> bytes:
        """Request `number`; with `stamps` its chunks carry token ids beside the text."""
        body = {
            "prompt": [*unique_ids(number), *self._prompt] if self._text is None else f"{number} {self._text}",
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": 1,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": stamps,
        }
        data = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data


def encode_request(num_words: int) -> bytes:
    """A text to encode."""
    return tokenizer_pb2.EncodeRequest(text=text_of(num_words)).SerializeToString()


def decode_request(num_tokens: int) -> bytes:
    """Tokens to decode."""
    return tokenizer_pb2.DecodeRequest(token_ids=_token_ids(num_tokens)).SerializeToString()
