"""A journal's tail is read in pieces of a bounded size, whatever its length."""

from __future__ import annotations

import pytest

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.kept import journal_script
from scalellm.services.tokenizer.kept.journal import Journal
from scalellm.services.tokenizer.kept.transcript import Transcript
from scalellm.v1 import common_pb2, link_pb2

TENANT = Tenant("acme")
SUBMIT = link_pb2.Submit(token_ids=[1, 2], sampling=common_pb2.SamplingParams(n=1))


class Redis:
    """A Redis with one journal, which keeps the sizes of its answers."""

    def __init__(self, tail: bytes) -> None:
        self.tail = tail
        self.sizes: list[int] = []

    async def eval(self, script: str, num_keys: int, *arguments: str) -> list[object]:
        assert script == journal_script.READ
        assert num_keys == 2
        _, _, known, edition, most = arguments
        start = int(known) if edition == "1" else 0
        piece = self.tail[start : start + int(most)]
        self.sizes.append(len(piece))
        return [b"e", 1, 1000, b"", b"", b"", 0, b"1", start, len(self.tail), piece]


async def read_all(redis: Redis) -> Transcript:
    """Read a journal to its end."""
    journal = Journal(redis, "worker", ttl=1.0, lease=1.0, max_bytes=1)  # type: ignore[arg-type]
    transcript, num_bytes, edition, is_whole = Transcript(SUBMIT), 0, "", False
    while not is_whole:
        reading = await journal.read(TENANT, "r", num_bytes, edition)
        assert reading is not None
        transcript.apply(reading.steps)
        num_bytes, edition, is_whole = reading.num_bytes, reading.edition, reading.is_whole
    assert num_bytes == len(redis.tail)
    return transcript


def tail(step_tokens: int, num_steps: int) -> bytes:
    written = Transcript(SUBMIT)
    return (
        b"".join(
            link_pb2.StepOutput(
                handles=[0],
                indices=[0],
                offsets=[number * step_tokens],
                counts=[step_tokens],
                token_ids=[*range(100_000, 100_000 + step_tokens)],
            ).SerializeToString()
            for number in range(num_steps)
        )
        + written.since(written.begin())[0].SerializeToString()
    )


@pytest.mark.parametrize(("step_tokens", "num_steps"), [(1, 50_000), (100, 2000), (4096, 40), (1, 0)])
async def test_a_long_tail_is_read_in_pieces(step_tokens: int, num_steps: int) -> None:
    redis = Redis(tail(step_tokens, num_steps))
    transcript = await read_all(redis)
    assert transcript.num_tokens == step_tokens * num_steps
    assert max(redis.sizes) <= 2**16
    assert len(redis.sizes) <= 2 + len(redis.tail) / (2**16 - 5 * step_tokens)


async def test_a_step_that_is_longer_than_a_piece_is_read_all_the_same() -> None:
    """As version N-1 wrote them, after Redis had lost the journal of a long answer."""
    redis = Redis(tail(100_000, 3))
    assert (await read_all(redis)).num_tokens == 300_000
    assert max(redis.sizes) < 2**20


async def test_what_is_no_journal_is_refused() -> None:
    with pytest.raises(StatusError, match="cannot be read"):
        await read_all(Redis(b"\xff" * 1_000_000))
