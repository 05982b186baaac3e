"""Every field that OpenAI's and vLLM's clients send is honoured, ignored or refused by name: none is unknown."""

from __future__ import annotations

import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.http.api_request import ApiRequest
from scalellm.services.tokenizer.http.chat_request import ChatRequest
from scalellm.services.tokenizer.http.completion_request import CompletionRequest

SAMPLING = (
    *("max_tokens", "n", "temperature", "top_p", "stop", "presence_penalty", "frequency_penalty", "logit_bias", "seed"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens"),
    *("include_stop_str_in_output", "prompt_logprobs"),
)
STREAMS = ("stream", "stream_options", "stream_interval", "return_token_ids", "priority", "request_id", "cache_salt")
HONOURED: dict[type[ApiRequest], tuple[str, ...]] = {
    ChatRequest: (
        *("messages", "model", "max_completion_tokens", "logprobs", "top_logprobs", "reasoning_effort", "session_id"),
        *("chat_template_kwargs", "add_generation_prompt", "continue_final_message", "echo", *SAMPLING, *STREAMS),
        *("tools", "tool_choice", "parallel_tool_calls", "documents", "include_reasoning", "thinking_token_budget"),
        *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    ),
    CompletionRequest: ("prompt", "model", "echo", "logprobs", "best_of", *SAMPLING, *STREAMS),
}
IGNORED: dict[type[ApiRequest], tuple[str, ...]] = {
    ChatRequest: (
        *("store", "service_tier", "safety_identifier", "verbosity", "prompt_cache_key", "user", "metadata"),
    ),
    CompletionRequest: ("user", "metadata", "store"),
}
REFUSED: dict[type[ApiRequest], dict[str, object]] = {
    ChatRequest: {
        "audio": {"voice": "a"},
        "modalities": ["text", "audio"],
        "web_search_options": {},
        "functions": [{"name": "f"}],
        "function_call": {"name": "f"},
        "use_beam_search": True,
        "bad_words": ["a"],
        "logits_processors": ["a"],
        "chat_template": "a",
    },
    CompletionRequest: {"suffix": "a", "use_beam_search": True, "bad_words": ["a"], "prompt_embeds": "a"},
}


@pytest.mark.parametrize("request_class", HONOURED)
def test_each_field_is_known(request_class: type[ApiRequest]) -> None:
    assert set(HONOURED[request_class]) <= request_class.model_fields.keys()
    assert set(IGNORED[request_class]) <= request_class.ignored - request_class.model_fields.keys()
    fields = dict.fromkeys((*HONOURED[request_class], *IGNORED[request_class], *REFUSED[request_class]))
    request_class.read(fields, is_strict=True)


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize(
    ("request_class", "name"), [(request_class, name) for request_class, names in REFUSED.items() for name in names]
)
def test_what_would_change_the_answer_is_refused(request_class: type[ApiRequest], name: str, is_strict: bool) -> None:
    with pytest.raises(StatusError) as caught:
        request_class.read({name: REFUSED[request_class][name]}, is_strict=is_strict)
    assert (caught.value.field, caught.value.message) == (name, f"{name}: is not supported here")
