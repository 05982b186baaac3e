"""An inbox: coalesces, trims replays, and is loud about gaps."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.limits import MAX_ANSWER_TOKENS
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import common_pb2, link_pb2


async def error_of(receiver: TokenReceiver) -> StatusError:
    with pytest.raises(StatusError) as error:
        await receiver.wait()
    return error.value


def is_awake(receiver: TokenReceiver) -> bool:
    task = receiver.wait()
    try:
        task.send(None)
    except StopIteration:
        return True
    task.close()
    return False


async def test_what_waits_is_merged():
    receiver = TokenReceiver(2)
    for offset in range(1000):
        receiver.on_tokens(1, offset, [offset], now=offset + 1)
    await receiver.wait()
    (batch,) = receiver.take()
    assert (batch.index, batch.token_ids) == (1, list(range(1000)))
    assert (receiver.first_token_at, receiver.last_token_at) == (1, 1000)
    assert receiver.take() == []
    assert not is_awake(receiver)


async def test_min_tokens_spares_wake_ups():
    receiver = TokenReceiver(1, min_tokens=3)
    receiver.on_tokens(0, 0, [1], now=1)
    assert is_awake(receiver)  # the first token is never held back
    assert len(receiver.take()) == 1
    receiver.on_tokens(0, 1, [2], now=1)
    receiver.on_tokens(0, 2, [3], now=1)
    assert not is_awake(receiver)
    assert receiver.take() == []
    receiver.on_tokens(0, 3, [4], now=1)
    assert is_awake(receiver)
    assert receiver.take()[0].token_ids == [2, 3, 4]
    receiver.on_tokens(0, 4, [5], now=1)
    receiver.on_sample_finish(link_pb2.LinkSampleFinish(handle=1, index=0, reason=common_pb2.FINISH_REASON_LENGTH))
    assert is_awake(receiver)
    assert receiver.take()[0].token_ids == [5]


async def test_finish_releases_what_is_held():
    receiver = TokenReceiver(1, min_tokens=10)
    receiver.on_tokens(0, 0, [1], now=1)
    receiver.take()
    receiver.on_tokens(0, 1, [2], now=1)
    receiver.on_finish(link_pb2.Finish(handle=1), now=0)
    assert receiver.take()[0].token_ids == [2]


@pytest.mark.parametrize(("offset", "tokens", "expected"), [(0, [1, 2], []), (1, [2, 3], [3]), (2, [3, 4], [3, 4])])
async def test_replays_are_trimmed(offset, tokens, expected):
    receiver = TokenReceiver(1)
    receiver.on_tokens(0, 0, [1, 2], now=1)
    receiver.take()
    receiver.on_tokens(0, offset, tokens, now=2)
    assert [token for batch in receiver.take() for token in batch.token_ids] == expected


async def test_a_gap_is_loud():
    receiver = TokenReceiver(1)
    receiver.on_tokens(0, 0, [1], now=1)
    receiver.on_tokens(0, 3, [4], now=1)
    error = await error_of(receiver)
    assert error.code is grpc.StatusCode.INTERNAL
    assert error.message == "the scheduler skipped tokens 1 to 2 of sample 0"


async def test_an_unknown_sample_is_loud():
    receiver = TokenReceiver(1)
    receiver.on_tokens(1, 0, [1], now=1)
    assert (await error_of(receiver)).message == "the scheduler sent sample 1, which was not asked for"


async def test_missing_logprobs_are_loud():
    receiver = TokenReceiver(1, logprobs=True)
    receiver.on_tokens(0, 0, [1, 2], now=1)
    with pytest.raises(StatusError, match="skipped log-probabilities 0 to 1 of sample 0"):
        receiver.take()
    receiver = TokenReceiver(1, num_prompt_logprobs=3)
    receiver.on_prompt_logprobs(link_pb2.LinkLogprobs(offset=0, values=common_pb2.TokenLogprobs(logprobs=[0.0, -1.0])))
    assert receiver.take_prompt_logprobs() == []
    receiver.on_tokens(0, 0, [1], now=1)
    with pytest.raises(StatusError, match="skipped log-probabilities 2 to 2 of the prompt"):
        receiver.take()
    receiver.on_prompt_logprobs(link_pb2.LinkLogprobs(offset=1, values=common_pb2.TokenLogprobs(logprobs=[-1.0, -2.0])))
    ((offset, values),) = receiver.take_prompt_logprobs()
    assert (offset, list(values.logprobs)) == (0, [0.0, -1.0, -2.0])
    assert receiver.take_prompt_logprobs() == []


def scores(offset: int, count: int, num_top: int = 2) -> link_pb2.LinkLogprobs:
    """Log-probabilities of numbered tokens, with alternatives that are numbered, too."""
    places = range(offset, offset + count)
    values = common_pb2.TokenLogprobs(
        logprobs=[-float(place) for place in places],
        num_top=num_top,
        top_token_ids=[place * num_top + rank for place in places for rank in range(num_top)],
        top_logprobs=[-float(rank) for _ in places for rank in range(num_top)],
    )
    return link_pb2.LinkLogprobs(offset=offset, values=values)


async def test_what_a_slow_reader_left_is_taken_in_parts_that_fit_a_message():
    receiver, total = TokenReceiver(1, logprobs=True), 2 * MAX_ANSWER_TOKENS + 3
    for offset in range(0, total, 100):
        count = min(100, total - offset)
        receiver.on_logprobs(scores(offset, count))
        receiver.on_tokens(0, offset, list(range(offset, offset + count)), now=1)
    receiver.on_sample_finish(link_pb2.LinkSampleFinish(handle=1, index=0, reason=common_pb2.FINISH_REASON_LENGTH))
    batches = receiver.take()
    assert [len(batch.token_ids) for batch in batches] == [MAX_ANSWER_TOKENS, MAX_ANSWER_TOKENS, 3]
    assert [batch.finish is not None for batch in batches] == [False, False, True]
    assert [token for batch in batches for token in batch.token_ids] == list(range(total))
    assert [value for batch in batches for value in batch.logprobs.logprobs] == [
        -float(place) for place in range(total)
    ]
    assert [token for batch in batches for token in batch.logprobs.top_token_ids] == list(range(2 * total))


@pytest.mark.parametrize("piece", [100, 1000, MAX_ANSWER_TOKENS, 3 * MAX_ANSWER_TOKENS])
async def test_a_prompt_comes_in_the_same_parts_however_it_was_computed(piece):
    total = 2 * MAX_ANSWER_TOKENS + 3
    receiver, parts = TokenReceiver(1, num_prompt_logprobs=total), []
    for offset in range(0, total, piece):
        receiver.on_prompt_logprobs(scores(offset, min(piece, total - offset)))
        if is_awake(receiver):
            parts += receiver.take_prompt_logprobs()
    receiver.on_tokens(0, 0, [1], now=1)
    parts += receiver.take_prompt_logprobs()
    assert len(receiver.take()) == 1
    assert [offset for offset, _ in parts] == [0, MAX_ANSWER_TOKENS, 2 * MAX_ANSWER_TOKENS]
    assert [len(values.logprobs) for _, values in parts] == [MAX_ANSWER_TOKENS, MAX_ANSWER_TOKENS, 3]
    assert [token for _, values in parts for token in values.top_token_ids] == list(range(2 * total))


async def test_alternatives_that_do_not_fit_their_tokens_are_loud():
    receiver = TokenReceiver(1, num_prompt_logprobs=4)
    receiver.on_prompt_logprobs(scores(0, 2, num_top=0))
    receiver.on_prompt_logprobs(scores(2, 2, num_top=1))
    assert (await error_of(receiver)).message == "the scheduler sent alternatives that do not fit the tokens"
    receiver, entry = TokenReceiver(1, logprobs=True), scores(0, 2)
    entry.values.top_token_ids.pop()
    receiver.on_logprobs(entry)
    assert (await error_of(receiver)).message == "the scheduler sent alternatives that do not fit the tokens"


async def test_the_first_error_stays():
    receiver = TokenReceiver(1)
    waiting = asyncio.create_task(receiver.wait())
    await asyncio.sleep(0)
    receiver.fail(StatusError.unavailable("first"))
    receiver.fail(StatusError.unavailable("second"))
    with pytest.raises(StatusError, match="first"):
        await waiting
