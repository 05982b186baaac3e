"""A tenant pays for the prompt and the tokens that its client was shown, however the request ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from scalellm.services.common.access import Access
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.dialect import Dialect
from scalellm.services.tokenizer.generation.caller import Caller
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.generation.edges import Edges
from scalellm.services.tokenizer.generation.request_path import Generation, Resumption
from scalellm.services.tokenizer.limits import RequestLimits
from scalellm.services.tokenizer.metrics import EdgeMetrics
from scalellm.services.tokenizer.prompt_builder import Prompt
from scalellm.services.tokenizer.request_log import RequestLog
from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import common_pb2, generation_pb2, link_pb2

PROMPT = [11, 12, 13, 14]
MAX_TOKENS = 6
Play = Callable[[TokenReceiver], None]


class Ledger:
    """Quotas that let everything in and write down what is paid."""

    def __init__(self) -> None:
        self.max_readers = 1
        self.num_readers = 0
        self.reserved: list[int] = []
        self.paid: list[int] = []

    async def admit(self, tenant: object, priority: int) -> Ledger:
        return self

    async def reserve(self, tokens: int) -> None:
        self.reserved.append(tokens)

    def end(self, tokens: int) -> None:
        self.paid.append(tokens)

    @asynccontextmanager
    async def reading(self, tenant: object) -> AsyncIterator[None]:
        if self.num_readers >= self.max_readers:
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "concurrent_requests: ...")
        self.num_readers += 1
        try:
            yield
        finally:
            self.num_readers -= 1


class Schedulers:
    """Schedulers that play what they are told when a request comes."""

    vocab_size = 1000

    def __init__(self, play: Play) -> None:
        self._play = play

    def check_room(self, tenant: bytes) -> None:
        pass

    async def wait_up(self, limit: float) -> link_pb2.Welcome:
        return link_pb2.Welcome(max_model_len=10)

    def submit(self, submit: link_pb2.Submit, *, min_tokens: int) -> TokenReceiver:
        self.receiver = TokenReceiver(submit.sampling.n, min_tokens=min_tokens)
        self._play(self.receiver)
        return self.receiver

    def stop_sample(self, receiver: TokenReceiver, index: int) -> None:
        usage = common_pb2.Usage(prompt_tokens=len(PROMPT), completion_tokens=MAX_TOKENS)
        receiver.on_finish(link_pb2.Finish(usage=usage), 0)

    def release(self, receiver: TokenReceiver, reason: link_pb2.AbortReason) -> None:
        pass


class Prompts:
    """Every text has the same tokens, each token is one letter."""

    def __init__(self, texts: TokenTexts) -> None:
        self.texts = texts
        self.writing = SimpleNamespace(
            texts=texts, dialect=Dialect(), added_ids={}, end_ids=(), can_count_reasoning=False
        )

    async def build(self, request: generation_pb2.GenerateRequest, session: None, **how: object) -> Prompt:
        return Prompt(request.tokens.ids if request.HasField("tokens") else PROMPT)


class Client(Caller):
    """A client that waits for ever."""

    transport, method = "grpc", "test"
    span_attributes: Mapping[str, str] = {}
    metadata = ()

    def time_remaining(self) -> float | None:
        return None


def tokens(count: int) -> Play:
    return lambda receiver: receiver.on_tokens(0, 0, [100 + number for number in range(count)], 0)


def ends(code: int = 0, *, usage: int) -> Play:
    """The scheduler ends the request; `usage` tokens were generated."""

    def play(receiver: TokenReceiver) -> None:
        if not code:
            receiver.on_sample_finish(link_pb2.LinkSampleFinish(reason=common_pb2.FINISH_REASON_LENGTH))
        status = link_pb2.LinkStatus(code=code, message="scripted")
        counts = common_pb2.Usage(prompt_tokens=len(PROMPT), completion_tokens=usage)
        receiver.on_finish(link_pb2.Finish(status=status, usage=counts), 0)

    return play


def leaves(receiver: TokenReceiver) -> None:
    raise asyncio.CancelledError


def loses_its_scheduler(receiver: TokenReceiver) -> None:
    receiver.fail(StatusError.unavailable("lost"))


def make_edge(texts: object, play: Play) -> SimpleNamespace:
    metrics = EdgeMetrics(CollectorRegistry(), ["m"])
    edge = SimpleNamespace(
        models=Edges(),
        model_name="m",
        prompts=Prompts(texts),
        tokenizer_size=1000,
        vocab_size=1000,
        schedulers=Schedulers(play),
        limits=RequestLimits(),
        metrics=metrics,
        model_metrics=metrics.models["m"],
        salt_secret="",
        access=Access(),
        quotas=Ledger(),
        request_log=RequestLog(TokenizerSettings(model="m")),
        tracer=None,
        sampling_defaults=common_pb2.SamplingParams(),
    )
    assert set(vars(edge)) <= {*Edge.__dataclass_fields__, "vocab_size"}
    return edge


async def charge(texts: object, play: Play, then: Play | None = None, **fields: Any) -> tuple[Ledger, int, Any]:
    """Return what was paid for a request, the tokens its client saw, and how it ended.

    Args:
        texts: Text of each token.
        play: Messages of the scheduler when the request comes.
        then: Messages of the scheduler once the client has seen those.
        fields: Fields of the request.
    """
    edge = make_edge(texts, play)
    ledger = edge.quotas
    if "tokens" not in fields:
        fields["prompt"] = "text"
    sampling = common_pb2.SamplingParams(max_tokens=fields.pop("max_tokens", MAX_TOKENS), seed=1)
    request = generation_pb2.GenerateRequest(sampling=sampling, **fields)
    generation, seen = Generation(edge, request, Client()), 0  # type: ignore[arg-type]
    try:
        async with generation:
            async for event in generation.events:
                if isinstance(event, Delta):
                    seen += event.num_tokens
                    if then is not None:
                        then(edge.schedulers.receiver)
    except (StatusError, asyncio.CancelledError) as error:
        return ledger, seen, error.code if isinstance(error, StatusError) else "left"
    return ledger, seen, None


UNAVAILABLE, EXHAUSTED, DEADLINE = 14, 8, 4


@pytest.mark.parametrize(
    ("shown", "then", "end"),
    [
        (6, ends(usage=6), None),
        (3, ends(UNAVAILABLE, usage=5), grpc.StatusCode.UNAVAILABLE),
        (2, ends(DEADLINE, usage=2), grpc.StatusCode.DEADLINE_EXCEEDED),
        (3, loses_its_scheduler, grpc.StatusCode.UNAVAILABLE),
        (2, leaves, "left"),
    ],
)
async def test_a_request_that_ran_pays_for_its_prompt_and_what_was_shown(texts, shown, then, end):
    ledger, seen, ended = await charge(texts, tokens(shown), then)
    assert (seen, ended) == (shown, end)
    assert ledger.reserved == [len(PROMPT) + MAX_TOKENS]
    assert ledger.paid == [len(PROMPT) + shown]


async def test_what_is_generated_beyond_a_stop_text_is_not_the_clients_doing(texts):
    letters = texts.detokenizer(skip_special_tokens=True)
    stop = letters.push([100, 101, 102])
    ledger, seen, ended = await charge(texts, tokens(6), stop=[stop])
    assert (seen, ended) == (3, None)
    assert ledger.paid == [len(PROMPT) + 3]


async def test_a_refusal_by_the_scheduler_costs_nothing(texts):
    ledger, seen, ended = await charge(texts, ends(EXHAUSTED, usage=0))
    assert (seen, ended) == (0, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert ledger.paid == [0]


@pytest.mark.parametrize(
    ("fields", "paid"),
    [
        ({"priority": 10**6}, 0),
        ({"max_tokens": 7}, len(PROMPT)),  # found out when the text was encoded, which was work
        ({"max_tokens": 7, "tokens": generation_pb2.TokenIds(ids=PROMPT)}, 0),
    ],
)
async def test_a_refusal_before_it_costs_what_was_encoded(texts, fields, paid):
    ledger, seen, ended = await charge(texts, tokens(0), **fields)
    assert (seen, ended) == (0, grpc.StatusCode.INVALID_ARGUMENT)
    assert (ledger.reserved, ledger.paid) == ([], [paid])


async def test_who_reads_a_kept_answer_holds_a_place_until_it_leaves(texts):
    edge = make_edge(texts, tokens(0))
    looked_up = []

    async def find(*_: object) -> None:
        looked_up.append(edge.quotas.num_readers)
        raise StatusError(grpc.StatusCode.NOT_FOUND, "no such request")

    edge.kept = SimpleNamespace(find=find)
    for places, code in ((1, grpc.StatusCode.NOT_FOUND), (0, grpc.StatusCode.RESOURCE_EXHAUSTED)):
        edge.quotas = Ledger()
        edge.quotas.max_readers = places
        with pytest.raises(StatusError) as error:
            async with Resumption(edge, generation_pb2.ResumeRequest(request_id="r"), Client()) as call:
                await anext(call.events)
        assert error.value.code is code
    assert looked_up == [1], "what is refused costs no look-up"
