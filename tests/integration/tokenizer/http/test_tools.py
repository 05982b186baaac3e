"""/tokenize, /detokenize, /tokenizer_info, /version and /metrics."""

from __future__ import annotations

import pytest

from line import scrape
from scalellm import __version__


async def test_a_text_becomes_tokens_and_tokens_a_text(http, tokenizer):
    text = "Hello, wörld <|im_end|>"
    made = (await http.post("/tokenize", {"prompt": text, "return_token_strs": True})).json
    ids = tokenizer.encode(text).ids
    assert made == {
        "count": len(ids),
        "max_model_len": 2048,
        "tokens": ids,
        "token_strs": [tokenizer.id_to_token(token) for token in ids],
    }
    assert (await http.post("/detokenize", {"tokens": ids})).json == {"prompt": text}


async def test_messages_become_what_a_chat_gives_the_model(http, scheduler):
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    await http.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    made = (await http.post("/tokenize", {"messages": messages})).json
    assert made["tokens"] == list(scheduler.submits[0].token_ids)
    shorter = (await http.post("/tokenize", {"messages": messages, "add_generation_prompt": False})).json
    assert shorter["count"] < made["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a" * (2**20 + 1)}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
async def test_refusals_name_the_field(http, path, body, param):
    reply = await http.post(path, body)
    assert (reply.status, reply.error["param"]) == (400, param)


async def test_what_is_served_here(http, service, tokenizer):
    info = (await http.get("/tokenizer_info")).json
    assert info["special_tokens"]["<|im_end|>"] == tokenizer.token_to_id("<|im_end|>")
    assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "im_start" in info["chat_template"]
    assert (await http.get("/version")).json == {"version": __version__}
    models = (await http.get("/v1/models")).json["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("smollm2-135m-instruct", 2048)]


async def test_metrics_are_those_of_the_endpoint(http, service, scheduler):
    await http.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})
    reply = await http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    shown = dict(line.rsplit(" ", 1) for line in reply.body.decode().splitlines() if not line.startswith("#"))
    name = 'scalellm_tokenizer_requests_ended_total{code="OK",outcome="finished",transport="http"}'
    assert float(shown[name]) == scrape(service)[name] > 0
