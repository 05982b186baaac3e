"""A chat's way to token ids, with the variables that a request gives to the template."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from scalellm.services.tokenizer.prompt_builder import PromptBuilder
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer
from scalellm.v1 import generation_pb2

TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
{%- if persona is defined %}{{ persona | tojson }}{% endif %}"""
"""Reads `enable_thinking` as Qwen3's does."""


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"persona": {"<|im_end|>": ["<|im_start|>", 1]}}])
async def test_variables_reach_the_template_like_transformers(
    smollm: ModelTokenizer, smollm_oracle: PreTrainedTokenizerFast, kwargs
):
    said = [("user", "1 + 1?"), ("assistant", "It is")]
    async with PromptBuilder(replace(smollm, chat_templates={"default": TEMPLATE})) as builder:
        for continues, is_text in itertools.product((False, True), repeat=2):
            case = f"{continues=}, {is_text=}"
            chat = generation_pb2.Chat(
                messages=[generation_pb2.ChatMessage(role=role, content=content) for role, content in said],
                template_kwargs=json.dumps(kwargs) if kwargs else "",
                continue_final_message=continues,
                content_is_text=is_text,
            )
            read = smollm_oracle.apply_chat_template(
                [{"role": role, "content": content} for role, content in said],
                chat_template=TEMPLATE,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=False,
                **kwargs,
            )
            request = generation_pb2.GenerateRequest(chat=chat)
            prompt = await builder.build(request, None, caller="", max_model_len=1000)
            text = await builder.render(chat, caller="")
            assert text.plain == read, case
            ids = list(prompt.token_ids)
            assert smollm.tokenizer.decode(ids, skip_special_tokens=False) == read, case
            if not is_text:
                assert ids == smollm_oracle.encode(read, add_special_tokens=False), case
            # What stands in a variable is text where contents are.
            ends = ids.count(smollm.tokenizer.token_to_id("<|im_end|>"))
            assert ends == 2 - continues + ("persona" in kwargs and not is_text and not continues), case
