"""Bytes that are nearly messages, for fuzzing."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from scalellm.services.common.link import API_MINOR
from scalellm.v1 import common_pb2, link_pb2

SAMPLING = common_pb2.SamplingParams(
    max_tokens=3, n=2, temperature=0.5, logit_bias=[{"token_id": 5, "bias": 1.5}], stop_token_ids=[7]
)
FRAMES = (
    link_pb2.ClientFrame(hello=link_pb2.Hello(client_id="fuzz", api_minor=API_MINOR)),
    link_pb2.ClientFrame(submit=link_pb2.Submit(handle=1, token_ids=[1, 2], sampling=SAMPLING, cache_salt=b"s")),
    link_pb2.ClientFrame(abort=link_pb2.Abort(handle=1, index=0, reason=link_pb2.ABORT_REASON_STOP)),
    link_pb2.ClientFrame(),
)


def mutations(messages: tuple) -> st.SearchStrategy[bytes]:
    """Random bytes, and messages with bytes changed, cut out or repeated."""

    def mutate(data: bytes, number: int) -> bytes:
        rng, changed = random.Random(number), bytearray(data)
        for _ in range(rng.randint(0, 4)):
            place = rng.randrange(len(changed) + 1)
            match rng.randrange(4):
                case 0 if place < len(changed):
                    changed[place] = rng.randrange(256)
                case 1:
                    del changed[place : place + rng.randint(1, 4)]
                case 2:
                    changed[place:place] = rng.randbytes(rng.randint(1, 4))
                case _:
                    changed += changed[place : place + 16]
        return bytes(changed)

    valid = st.sampled_from([message.SerializeToString() for message in messages])
    return st.one_of(st.binary(max_size=200), st.builds(mutate, valid, st.integers(0, 2**32)))
