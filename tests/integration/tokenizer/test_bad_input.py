"""Bad input over the wire: the right code, a message that names field and limit, and a service that stays healthy."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scalellm.v1 import common_pb2, generation_pb2, sessions_pb2, tokenizer_pb2
from service_processes import PATIENCE

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN = float("nan")
INF = float("inf")


def chat(*messages, **fields):
    return generation_pb2.Chat(
        messages=[generation_pb2.ChatMessage(role=role, content=content) for role, content in messages], **fields
    )


def generate(**fields):
    sampling = common_pb2.SamplingParams(**fields.pop("sampling", {}))
    if not {"prompt", "chat", "tokens", "no_input"} & set(fields):
        fields["prompt"] = "Hello"
    fields.pop("no_input", None)
    return generation_pb2.GenerateRequest(sampling=sampling, **fields)


def bias(values):
    return [common_pb2.LogitBias(token_id=token_id, bias=value) for token_id, value in values.items()]


HI = ("user", "Hi")

GENERATE = {
    "no input": (generate(no_input=True), "input", "one of prompt, chat and tokens must be set"),
    "request_id empty": (generate(request_id=""), "request_id", "1 to 128 characters of [A-Za-z0-9._:-], got ''"),
    "request_id long": (generate(request_id="x" * 129), "request_id", "got 129 characters"),
    "request_id characters": (generate(request_id="a b"), "request_id", "got 'a b'"),
    "prompt empty": (generate(prompt=""), "prompt", "must not be empty"),
    "prompt bytes": (generate(prompt="é" * 530_000), "prompt", "at most 1048576 bytes, got 1060000"),
    "prompt tokens": (generate(prompt="x " * 4000), "prompt", "at most 2047 tokens (the model's context holds 2048"),
    "tokens ids": (
        generate(tokens={"ids": [1] * (2**18 + 1)}),
        "tokens.ids",
        "must hold at most 262144 token ids, got 262145",
    ),
    "chat empty": (generate(chat=chat()), "chat.messages", "must hold 1 to 1024 messages, got 0"),
    "chat messages": (generate(chat=chat(*[HI] * 1025)), "chat.messages", "1 to 1024 messages, got 1025"),
    "chat role empty": (generate(chat=chat(HI, ("", "Hi"))), "chat.messages[1].role", "1 to 64 bytes, got 0"),
    "chat role long": (generate(chat=chat(("r" * 65, "Hi"))), "chat.messages[0].role", "1 to 64 bytes, got 65"),
    "chat bytes": (generate(chat=chat(("user", "x" * 2**20))), "chat.messages", "at most 1048576 bytes of text"),
    "tokens empty": (generate(tokens=generation_pb2.TokenIds()), "tokens.ids", "at least one token id"),
    "tokens range": (
        generate(tokens=generation_pb2.TokenIds(ids=[1, 49152])),
        "tokens.ids[1]",
        "below the vocabulary size 49152, got 49152",
    ),
    "tokens number": (generate(tokens=generation_pb2.TokenIds(ids=[1] * 2048)), "tokens", "at most 2047 tokens"),
    "n zero": (generate(sampling={"n": 0}), "sampling.n", "[1, 16], got 0"),
    "n large": (generate(sampling={"n": 17}), "sampling.n", "[1, 16], got 17"),
    "max_tokens zero": (generate(sampling={"max_tokens": 0}), "sampling.max_tokens", "at least 1, got 0"),
    "max_tokens large": (
        generate(sampling={"max_tokens": 2048}),
        "sampling.max_tokens",
        "at most 2047 (the model's context holds 2048 tokens, the prompt has 1), got 2048",
    ),
    "min_tokens over max": (
        generate(sampling={"max_tokens": 3, "min_tokens": 4}),
        "sampling.min_tokens",
        "at most max_tokens (3), got 4",
    ),
    "min_tokens large": (generate(sampling={"min_tokens": 2048}), "sampling.min_tokens", "at most 2047"),
    "temperature low": (generate(sampling={"temperature": -0.1}), "sampling.temperature", "[0, 100], got -0.1"),
    "temperature high": (generate(sampling={"temperature": 101}), "sampling.temperature", "[0, 100], got 101"),
    "temperature nan": (generate(sampling={"temperature": NAN}), "sampling.temperature", "[0, 100], got nan"),
    "temperature inf": (generate(sampling={"temperature": INF}), "sampling.temperature", "[0, 100], got inf"),
    "top_p zero": (generate(sampling={"top_p": 0}), "sampling.top_p", "must be in (0, 1], got 0"),
    "top_p high": (generate(sampling={"top_p": 3}), "sampling.top_p", "must be in (0, 1], got 3"),
    "top_p nan": (generate(sampling={"top_p": NAN}), "sampling.top_p", "got nan"),
    "min_p low": (generate(sampling={"min_p": -1}), "sampling.min_p", "[0, 1], got -1"),
    "min_p high": (generate(sampling={"min_p": 1.5}), "sampling.min_p", "[0, 1], got 1.5"),
    "presence_penalty": (generate(sampling={"presence_penalty": 3}), "sampling.presence_penalty", "[-2, 2], got 3"),
    "frequency_penalty": (
        generate(sampling={"frequency_penalty": -INF}),
        "sampling.frequency_penalty",
        "[-2, 2], got -inf",
    ),
    "repetition_penalty zero": (
        generate(sampling={"repetition_penalty": 0}),
        "sampling.repetition_penalty",
        "(0, 2], got 0",
    ),
    "repetition_penalty nan": (generate(sampling={"repetition_penalty": NAN}), "sampling.repetition_penalty", "nan"),
    "logit_bias id": (
        generate(sampling={"logit_bias": bias({5: 1.0, 49152: 1.0})}),
        "sampling.logit_bias[1].token_id",
        "below the vocabulary size 49152, got 49152",
    ),
    "logit_bias value": (
        generate(sampling={"logit_bias": bias({5: NAN})}),
        "sampling.logit_bias[0].bias",
        "[-100, 100], got nan",
    ),
    "logit_bias number": (
        generate(sampling={"logit_bias": bias(dict.fromkeys(range(1025), 1.0))}),
        "sampling.logit_bias",
        "at most 1024 entries, got 1025",
    ),
    "logit_bias twice": (
        generate(sampling={"logit_bias": [*bias({5: 1.0, 6: 1.0}), *bias({5: 2.0})]}),
        "sampling.logit_bias[2].token_id",
        "named once, got 5 again",
    ),
    "stop_token_ids range": (
        generate(sampling={"stop_token_ids": [2**32 - 1]}),
        "sampling.stop_token_ids[0]",
        "below the vocabulary size",
    ),
    "stop_token_ids number": (
        generate(sampling={"stop_token_ids": range(65)}),
        "sampling.stop_token_ids",
        "at most 64 entries, got 65",
    ),
    "logprobs": (generate(sampling={"logprobs": 21}), "sampling.logprobs", "[0, 20], got 21"),
    "prompt_logprobs": (generate(sampling={"prompt_logprobs": 21}), "sampling.prompt_logprobs", "[0, 20], got 21"),
    "stop number": (generate(stop=["x"] * 17), "stop", "at most 16 entries, got 17"),
    "stop empty": (generate(stop=["x", ""]), "stop[1]", "1 to 256 bytes, got 0"),
    "stop long": (generate(stop=["é" * 129]), "stop[0]", "1 to 256 bytes, got 258"),
    "stop without text": (generate(stop=["x"], output=2), "stop", "must be empty with output OUTPUT_TOKEN_IDS"),
    "session_id empty": (generate(chat=chat(HI), session_id=""), "session_id", "1 to 128 characters"),
    "session_id characters": (generate(chat=chat(HI), session_id="a/b"), "session_id", "got 'a/b'"),
    "session with prompt": (generate(session_id="s"), "session_id", "needs chat as the input, got prompt"),
    "session with n": (
        generate(chat=chat(HI), session_id="s", sampling={"n": 2}),
        "sampling.n",
        "must be 1 with session_id, got 2",
    ),
    "session without header": (
        generate(chat=chat(HI, add_generation_prompt=False), session_id="s"),
        "chat.add_generation_prompt",
        "must be true with session_id",
    ),
    "priority low": (generate(priority=-101), "priority", "[-100, 100], got -101"),
    "priority high": (generate(priority=101), "priority", "[-100, 100], got 101"),
    "output unknown": (generate(output=9), "output", "must be a value of Output, got 9"),
    "cache_salt empty": (generate(cache_salt=""), "cache_salt", "must have 1 to 128 bytes, got 0"),
    "cache_salt long": (generate(cache_salt="é" * 65), "cache_salt", "must have 1 to 128 bytes, got 130"),
    "stream_interval zero": (generate(stream_interval=0), "stream_interval", "[1, 1024], got 0"),
    "stream_interval large": (generate(stream_interval=1025), "stream_interval", "[1, 1024], got 1025"),
}

UNARY = {
    "Encode text": (
        "tokenizer",
        "Encode",
        tokenizer_pb2.EncodeRequest(text="x" * (2**20 + 1)),
        INVALID,
        "text: must have at most 1048576 bytes, got 1048577",
    ),
    "Encode tokens": (
        "tokenizer",
        "Encode",
        tokenizer_pb2.EncodeRequest(text="7" * 300_000),
        INVALID,
        "text: must have at most 262144 tokens, got at least 300000",
    ),
    "Decode range": (
        "tokenizer",
        "Decode",
        tokenizer_pb2.DecodeRequest(token_ids=[1, 2, 49152]),
        INVALID,
        "token_ids[2]: must be below the vocabulary size 49152, got 49152",
    ),
    "Decode number": (
        "tokenizer",
        "Decode",
        tokenizer_pb2.DecodeRequest(token_ids=[1] * (2**18 + 1)),
        INVALID,
        "token_ids: must hold at most 262144 token ids, got 262145",
    ),
    "ApplyChatTemplate without chat": (
        "tokenizer",
        "ApplyChatTemplate",
        tokenizer_pb2.ApplyChatTemplateRequest(),
        INVALID,
        "chat.messages: must hold 1 to 1024 messages, got 0",
    ),
    "Get without id": ("sessions", "Get", sessions_pb2.GetSessionRequest(), INVALID, "session_id: must be 1 to 128"),
    "Get unknown": (
        "sessions",
        "Get",
        sessions_pb2.GetSessionRequest(session_id="nobody"),
        grpc.StatusCode.NOT_FOUND,
        "session_id: there is no session 'nobody', or it expired",
    ),
    "Delete unknown": (
        "sessions",
        "Delete",
        sessions_pb2.DeleteSessionRequest(session_id="nobody"),
        grpc.StatusCode.NOT_FOUND,
        "'nobody'",
    ),
    "Delete bad id": (
        "sessions",
        "Delete",
        sessions_pb2.DeleteSessionRequest(session_id="\u00e9"),
        INVALID,
        "session_id: must be 1 to 128",
    ),
    "Fork unknown": (
        "sessions",
        "Fork",
        sessions_pb2.ForkSessionRequest(session_id="nobody", new_session_id="x"),
        grpc.StatusCode.NOT_FOUND,
        "'nobody'",
    ),
    "Fork new id": (
        "sessions",
        "Fork",
        sessions_pb2.ForkSessionRequest(session_id="nobody"),
        INVALID,
        "new_session_id: must be 1 to 128",
    ),
    "List page_size": (
        "sessions",
        "List",
        sessions_pb2.ListSessionsRequest(page_size=1001),
        INVALID,
        "page_size: must be in [1, 1000], got 1001",
    ),
    "List page_token": (
        "sessions",
        "List",
        sessions_pb2.ListSessionsRequest(page_token="@@"),
        INVALID,
        "page_token: must be empty or the next_page_token of an earlier answer",
    ),
}

RAW = {
    "truncated": ("Generation/Generate", b"\x0a\xff", INVALID),
    "wrong wire type": ("Generation/Generate", b"\x12\x01x\x2b", INVALID),
    "prompt that is not UTF-8": ("Generation/Generate", b"\x12\x02\xff\xfe", INVALID),
    "text that is not UTF-8": ("Tokenizer/Encode", b"\x0a\x02\xff\xfe", INVALID),
    "message that is not UTF-8": ("Tokenizer/ApplyChatTemplate", b"\x0a\x06\x0a\x04\x12\x02\xc0\x80", INVALID),
    "id that is not UTF-8": ("Sessions/Get", b"\x0a\x02\xff\xfe", INVALID),
    "oversize prompt": ("Generation/Generate", b"\x12" + bytes(18 * 2**20), grpc.StatusCode.RESOURCE_EXHAUSTED),
    "oversize text": ("Tokenizer/Encode", b"\x0a" + bytes(18 * 2**20), grpc.StatusCode.RESOURCE_EXHAUSTED),
    "unknown method": ("Generation/Nothing", b"", grpc.StatusCode.UNIMPLEMENTED),
}


async def check_healthy(client) -> None:
    stub = health_pb2_grpc.HealthStub(client.channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert response.status == health_pb2.HealthCheckResponse.SERVING
    await client.generate(generate(sampling={"max_tokens": 1}), timeout=PATIENCE)


@pytest.mark.parametrize("name", GENERATE)
async def test_generate(client, scheduler, error_details, name):
    bad, field, message = GENERATE[name]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.generate(bad, timeout=PATIENCE)
    assert error.value.code() is INVALID
    assert error.value.details().startswith(f"{field}: ")
    assert message in error.value.details()
    assert error_details(error.value)[0] == {field: error.value.details()}
    assert scheduler.submits == []
    await check_healthy(client)


@pytest.mark.parametrize("name", UNARY)
async def test_unary(client, scheduler, name):
    service, method, bad, code, message = UNARY[name]
    details = "does not answer within"
    while "does not answer within" in details:  # the session store has a second, which a busy machine may exceed
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await getattr(getattr(client, service), method)(bad, timeout=PATIENCE)
        details = error.value.details()
    assert error.value.code() is code
    assert message in error.value.details()
    await check_healthy(client)


@pytest.mark.parametrize("name", RAW)
async def test_what_is_no_message(client, scheduler, name):
    method, data, code = RAW[name]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in client.channel.unary_stream(f"/scalellm.v1.{method}")(data, timeout=PATIENCE):
            pass
    assert error.value.code() is code
    if code is INVALID:
        assert "Request: malformed, or a string in it is not UTF-8" in error.value.details()
    await check_healthy(client)


@pytest.mark.parametrize("method", ["Generation/Generate", "Tokenizer/Encode"])
async def test_no_message_at_all(client, scheduler, method):
    call = client.channel.stream_stream(f"/scalellm.v1.{method}")(timeout=PATIENCE)
    await call.done_writing()
    assert await call.code() is INVALID  # at once, and not when the deadline passes
    assert (await call.details()).startswith("request: is missing: the call has no scalellm.v1.")
    await check_healthy(client)
