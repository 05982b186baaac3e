"""A tokenizer with more tokens than its model, or fewer: both sizes are known at the edge."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from scalellm.services.tokenizer.text.loading import load_model_tokenizer
from scalellm.v1 import common_pb2, generation_pb2, tokenizer_pb2
from scripted_scheduler import Script, ScriptedScheduler

IMAGE_TOKEN = "<image_soft_token>"  # Gemma 3 has it behind the last row of its embeddings
NUM_TOKENS = 49153


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def scheduler() -> AsyncIterator[ScriptedScheduler]:
    scheduler = await ScriptedScheduler().start()
    yield scheduler
    await scheduler.stop()


@pytest.fixture(scope="module")
def model(model_dir, tmp_path_factory):
    """A folder with SmolLM2's tokenizer and one more special token than the model has."""
    loaded = load_model_tokenizer(model_dir("smollm2-135m-instruct"))
    loaded.tokenizer.add_special_tokens([IMAGE_TOKEN])
    folder = tmp_path_factory.mktemp("model")
    loaded.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": loaded.chat_template}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest_asyncio.fixture(loop_scope="session")
async def client(request, module_spawn, scheduler, model, connect):
    scheduler.reset()
    scheduler.vocab_size = request.param
    service = module_spawn("tokenizer", "--scheduler", scheduler.address, "--model", str(model), "--workers", "1")
    client = connect(service.address)
    await client.wait_serving()
    yield client
    await client.channel.close()


def chat(*contents: str) -> generation_pb2.Chat:
    return generation_pb2.Chat(
        messages=[generation_pb2.ChatMessage(role="user", content=content) for content in contents]
    )


def code_and_message(error: pytest.ExceptionInfo) -> tuple[grpc.StatusCode, str]:
    return error.value.code(), error.value.details()


@pytest.mark.parametrize("client", [NUM_TOKENS - 1], indirect=True)
async def test_a_text_of_a_token_that_the_model_lacks(client, scheduler) -> None:
    why = (
        f"must not hold the text {IMAGE_TOKEN!r}: it is the special token 49152, and this model has only the tokens "
        "below 49152"
    )
    for field, fields in {
        "prompt": {"prompt": f"Look: {IMAGE_TOKEN}"},
        "chat.messages[1].content": {"chat": chat("Hi", f"Look: {IMAGE_TOKEN}")},
    }.items():
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.generate(generation_pb2.GenerateRequest(**fields))
        assert code_and_message(refused) == (grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {why}")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.generate(generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=[49152])))
    assert "tokens.ids[0]: must be below the vocabulary size 49152" in refused.value.details()
    assert not scheduler.submits

    info = await client.tokenizer.GetInfo(tokenizer_pb2.GetInfoRequest())
    assert info.vocab_size == 49152
    # What the tokenizer says of the text is no generation, and goes both ways.
    encoded = await client.tokenizer.Encode(tokenizer_pb2.EncodeRequest(text=IMAGE_TOKEN))
    assert list(encoded.token_ids) == [49152]
    request = tokenizer_pb2.DecodeRequest(token_ids=[49152], skip_special_tokens=False)
    assert (await client.tokenizer.Decode(request)).text == IMAGE_TOKEN

    # A prediction is only a guess: it ends before the token, and its request runs.
    kept = await client.tokenizer.Encode(tokenizer_pb2.EncodeRequest(text="A cat", add_special_tokens=False))
    await client.generate(generation_pb2.GenerateRequest(prompt="Hi", prediction=f"A cat{IMAGE_TOKEN} sat"))
    (submit,) = scheduler.submits
    assert submit.prediction_token_ids == kept.token_ids


@pytest.mark.parametrize("client", [NUM_TOKENS + 256], indirect=True)
async def test_ids_of_a_model_that_is_padded_beyond_its_tokenizer(client, scheduler) -> None:
    padded = NUM_TOKENS + 200
    scheduler.play = lambda submit: Script(samples=[[100, padded, 101]])
    sampling = common_pb2.SamplingParams(
        max_tokens=3,
        logit_bias=[common_pb2.LogitBias(token_id=padded, bias=1.0)],
        stop_token_ids=[padded + 1],
    )
    request = generation_pb2.GenerateRequest(
        prompt="Hi", sampling=sampling, output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS
    )
    first = await client.generate(request)
    assert first.token_ids() == [100, padded, 101]

    # What came out goes in again.
    again = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds(ids=first.token_ids()), sampling=sampling)
    await client.generate(again)
    assert list(scheduler.submits[-1].token_ids) == [100, padded, 101]
    decoded = await client.tokenizer.Decode(tokenizer_pb2.DecodeRequest(token_ids=[100, padded, 101]))
    assert decoded.text == first.text()
    assert (await client.tokenizer.GetInfo(tokenizer_pb2.GetInfoRequest())).vocab_size == NUM_TOKENS + 256

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.tokenizer.Decode(tokenizer_pb2.DecodeRequest(token_ids=[NUM_TOKENS + 256]))
    assert "token_ids[0]: must be below the vocabulary size 49409, got 49409" in refused.value.details()
