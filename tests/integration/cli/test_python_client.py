"""scalellm.client, with threads and with asyncio, against a scripted server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from scalellm.cli.generation import Generation
from scalellm.client import AsyncClient, Client, ClientError, Credentials
from scalellm.client.error_details import ErrorDetails, read_details
from scalellm.client.received import Received
from scalellm.client.reconnection import Reconnection
from scalellm.v1.common_pb2 import SamplingParams, TokenLogprobs
from scalellm.v1.generation_pb2 import (
    ON_DISCONNECT_KEEP,
    SESSION_OUTCOME_SAVED,
    Chat,
    ChatMessage,
    Delta,
    Finished,
    GenerateRequest,
    GenerateResponse,
    PromptLogprobs,
    Started,
)
from service_processes import PATIENCE


@pytest.fixture
async def client(fake_server: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake_server.address, timeout=PATIENCE) as client:
        yield client


def test_text_of_a_completion(fake_server: Any) -> None:
    with Client(fake_server.address) as client:
        stream = client.complete("three plain words", SamplingParams(max_tokens=5, n=2), timeout=PATIENCE)
        assert stream.started is None
        assert list(stream.text(1)) == ["three ", "plain ", "words "]
    assert stream.started is not None
    assert stream.started.request_id == "r1"
    assert stream.finished is not None
    assert [sample.index for sample in stream.finished.samples] == [0, 1]
    assert stream.offsets == (3, 3)
    (request,) = fake_server.requests
    assert (request.prompt, request.sampling.max_tokens) == ("three plain words", 5)


async def test_text_of_a_completion_with_asyncio(fake_server: Any, client: AsyncClient) -> None:
    async with client.complete("two words", SamplingParams(max_tokens=5), timeout=PATIENCE) as stream:
        assert [piece async for piece in stream.text()] == ["two ", "words "]
        assert stream.finished is not None
        assert stream.offsets == (2,)
        assert await stream.trailers() == {}
    assert fake_server.requests[0].sampling.max_tokens == 5


def test_a_conversation_is_kept_by_the_server(fake_server: Any) -> None:
    with Client(fake_server.address) as client:
        for question in ("one", "two"):
            stream = client.chat([("user", question)], SamplingParams(top_k=3), session_id="s")
            assert list(stream.text()) == [f"{question} "]
            assert stream.finished is not None
            assert stream.finished.session == SESSION_OUTCOME_SAVED
        assert stream.started is not None
        assert stream.started.session_turns == 1
        assert [request.sampling.top_k for request in fake_server.requests] == [3, 3]
        client.fork_session("s", "fork", num_turns=1)
        assert [session.session_id for session in client.list_sessions()] == ["s", "fork"]
        assert [message.content for message in client.get_session("fork").messages] == ["one", "one"]
        client.delete_session("s")
        with pytest.raises(ClientError, match="unknown or expired") as error:
            client.delete_session("s")
        assert error.value.code is grpc.StatusCode.NOT_FOUND


async def test_every_other_call_with_asyncio(client: AsyncClient) -> None:
    stream = client.chat([("user", "one")], session_id="s")
    assert [piece async for piece in stream.text()] == ["one "]
    assert list((await client.encode("ab")).token_ids) == [97, 98]
    assert await client.decode([97, 98]) == "ab"
    assert (await client.info()).model == "fake"
    await client.fork_session("s", "fork")
    assert [session.session_id async for session in client.list_sessions()] == ["s", "fork"]
    assert len((await client.get_session("fork")).messages) == 2
    await client.delete_session("s")
    with pytest.raises(ClientError, match="unknown or expired"):
        await client.get_session("s")
    chat = Chat(messages=[ChatMessage(role="user", content="x")])
    assert (await client.apply_chat_template(chat, model="second")).text == "x"
    assert (await client.info("second")).model == "second"


def test_leaving_the_block_cancels(fake_server: Any) -> None:
    with Client(fake_server.address) as client:
        with client.complete("forever") as stream:
            assert next(stream.text()) == "on and "
        assert fake_server.cancelled.wait(PATIENCE)
        with pytest.raises(ClientError) as error:
            list(stream)
        assert error.value.code is grpc.StatusCode.CANCELLED


async def test_closing_cancels_with_asyncio(fake_server: Any, client: AsyncClient) -> None:
    stream = client.complete("forever")
    assert await anext(stream.text()) == "on and "
    stream.close()
    with pytest.raises(ClientError) as error:
        async for _ in stream:
            pass
    assert error.value.code is grpc.StatusCode.CANCELLED
    assert await asyncio.to_thread(fake_server.cancelled.wait, PATIENCE)


async def test_cancelling_the_task_cancels_the_request(fake_server: Any, client: AsyncClient) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in client.complete("forever"):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(fake_server.cancelled.wait, PATIENCE)


async def test_errors_say_field_and_delay(fake_server: Any, client: AsyncClient) -> None:
    expected = {
        "bad": (grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p: must be in (0, 1], got 7", "sampling.top_p", None),
        "busy": (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full: 64 requests wait", "", 2.0),
    }
    with Client(fake_server.address) as threaded:
        for prompt, wanted in expected.items():
            with pytest.raises(ClientError) as error:
                list(threaded.complete(prompt))
            with pytest.raises(ClientError) as error_of_async:
                async for _ in client.complete(prompt):
                    pass
            for found in (error.value, error_of_async.value):
                assert (found.code, found.message, found.field, found.retry_after) == wanted
        with pytest.raises(ClientError) as error:
            list(threaded.complete("slow", timeout=0.2))
        assert error.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_kept_answer_goes_on(fake_server: Any, client: AsyncClient) -> None:
    request = GenerateRequest(prompt="lost and found", request_id="kept", on_disconnect=ON_DISCONNECT_KEEP)
    with Client(fake_server.address) as threaded:
        stream = threaded.generate(request)
        pieces = stream.text()
        text = next(pieces)
        with pytest.raises(ClientError, match="this server leaves") as error:
            next(pieces)
        assert error.value.retry_after == 0.0005
        resumed = threaded.resume("kept", stream.offsets, timeout=PATIENCE)
        assert text + "".join(resumed.text()) == "lost and found "
        assert resumed.offsets == (3,)
    rest = client.resume("kept", [2])
    assert [piece async for piece in rest.text()] == ["found "]
    assert rest.offsets == (3,)
    assert [list(request.offsets) for request in fake_server.resumed] == [[1], [2]]


async def test_a_stream_of_a_kept_answer_goes_on_by_itself(fake_server: Any, client: AsyncClient) -> None:
    request = GenerateRequest(prompt="moving on and on", on_disconnect=ON_DISCONNECT_KEEP)
    with Client(fake_server.address) as threaded:
        events = list(threaded.generate(request, timeout=PATIENCE))
        threaded.cancel("moving")
    assert [event.WhichOneof("event") for event in events] == ["started", *["delta"] * 4, "finished"]
    assert "".join(event.delta.text for event in events) == "moving on and on "
    stream = client.generate(request)
    assert [piece async for piece in stream.text()] == ["moving ", "on ", "and ", "on "]
    assert stream.offsets == (4,)
    assert [list(resumed.offsets) for resumed in fake_server.resumed] == 2 * [[1], [2], [3]]
    await client.cancel("moving")
    assert fake_server.ended == ["moving", "moving"]


def test_tries_are_bounded_and_an_answer_that_grows_has_them_again() -> None:
    lost = ClientError(grpc.StatusCode.UNAVAILABLE, "lost", retry_after=0.7)
    received, reconnection = Received(), Reconnection(lambda *_: None, None)
    assert reconnection.wait_after(lost, received) is None, "it has not begun"
    received.take(GenerateResponse(started=Started(request_id="r")))
    assert reconnection.wait_after(lost, received) is None, "it is not kept"
    received.take(GenerateResponse(started=Started(request_id="r", resumable=True)))
    for _ in range(2):
        waits = [reconnection.wait_after(lost, received) for _ in range(11)]
        assert waits == [0.7, 0.7, 0.7, 0.8, 1.6, 3.0, 3.0, 3.0, 3.0, 3.0, None]
        received.take(GenerateResponse(delta=Delta(num_tokens=1, offset=sum(received.offsets))))
    refused = ClientError(grpc.StatusCode.NOT_FOUND, "no longer kept")
    assert reconnection.wait_after(refused, received) is None
    assert Reconnection(lambda *_: None, 0.5).wait_after(lost, received) is None, "the deadline comes first"


def test_logprobs_of_a_prompt_that_come_again_are_left_out() -> None:
    received = Received()
    told: list[int] = []
    for offset, stop in ((0, 3), (0, 2), (0, 5), (5, 6)):
        count = stop - offset
        logprobs = TokenLogprobs(logprobs=range(offset, stop), num_top=2, top_token_ids=[7] * 2 * count)
        logprobs.top_logprobs.extend([-1.0] * 2 * count)
        part = PromptLogprobs(token_ids=range(offset, stop), logprobs=logprobs, offset=offset)
        response = GenerateResponse(prompt_logprobs=part)
        if received.take(response):
            part = response.prompt_logprobs
            assert len(part.logprobs.top_token_ids) == len(part.logprobs.top_logprobs) == 2 * len(part.token_ids)
            assert part.offset == part.token_ids[0] == part.logprobs.logprobs[0]
            told += part.token_ids
    assert told == [0, 1, 2, 3, 4, 5]


def test_the_end_that_comes_again_is_left_out() -> None:
    received = Received()
    told = [received.take(GenerateResponse(finished=Finished())) for _ in range(2)]
    assert told == [True, False]


def test_what_the_user_ends_does_not_go_on(fake_server: Any) -> None:
    request = GenerateRequest(prompt="moving on", on_disconnect=ON_DISCONNECT_KEEP)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with Client(fake_server.address) as client, pytest.raises(KeyboardInterrupt):
        Generation().run(client, request, interrupt)
    assert (fake_server.ended, fake_server.resumed) == (["moving"], [])


async def test_key_and_tls(secured_server: Any) -> None:
    identity, address = secured_server.identity, secured_server.server.address
    shown = {"tls_ca": identity.ca, "tls_cert": identity.cert, "tls_key": identity.key}
    with Client(address, credentials=Credentials("slm-secret", **shown)) as client:
        assert list(client.complete("yes").text()) == ["yes "]
    async with AsyncClient(address, credentials=Credentials("slm-secret", **shown)) as async_client:
        assert [piece async for piece in async_client.complete("yes").text()] == ["yes "]
    refused = {
        "no valid API key": Credentials("slm-guess", **shown),
        "does it ask clients for a certificate. Give tls_cert and tls_key": Credentials("x", tls_ca=identity.ca),
        "not of an authority that is publicly known": Credentials("x", tls=True),
        "does it expect TLS. Give tls_ca": Credentials("slm-secret"),
    }
    for message, credentials in refused.items():
        with (
            Client(address, credentials=credentials) as client,
            pytest.raises(ClientError, match=message),
        ):
            list(client.complete("no"))
        async with AsyncClient(address, credentials=credentials) as async_client:
            with pytest.raises(ClientError, match=message):
                async for _ in async_client.complete("no"):
                    pass


def test_details_are_read_as_googles_classes_write_them() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.n", description="too many")
    details = (
        error_details_pb2.ErrorInfo(reason="OTHER"),
        error_details_pb2.BadRequest(field_violations=[violation]),
        error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
    )
    status = status_pb2.Status(code=8, message="full")
    for detail in details:
        status.details.add().Pack(detail)
    trailers = (("other", "text"), ("grpc-status-details-bin", status.SerializeToString()))
    assert read_details(8, trailers) == ErrorDetails("sampling.n", 1.5)
    assert read_details(3, trailers) is None, "of another status"
    assert read_details(8, (("grpc-status-details-bin", b"\xff"),)) is None
    assert read_details(8, None) is None
