"""The known dialects, and the detection of a model's dialect by its chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from scalellm.services.tokenizer.dialect.dialect import (
    CallFormat,
    Channels,
    Dialect,
    Marks,
    PythonArguments,
    TaggedArguments,
    ToolsInPrompt,
)

HERMES = CallFormat(
    trigger="<tool_call>",
    before='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    separator="\n",
)
"""Hermes, Qwen2.5, Qwen3, and models whose template knows no tools."""

QWEN_CODER = CallFormat(
    trigger="<tool_call>",
    before="<tool_call>\n<function=",
    between=">\n",
    after="</function>\n</tool_call>",
    separator="\n",
    arguments=TaggedArguments("<parameter=", ">\n", "\n</parameter>\n"),
)

GLM = CallFormat(
    trigger="<tool_call>",
    before="<tool_call>",
    between="\n",
    after="</tool_call>",
    separator="\n",
    arguments=TaggedArguments("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
)
"""GLM 4.5 and 4.6."""

MISTRAL_LIST = CallFormat(
    trigger="[TOOL_CALLS]",
    begin="[TOOL_CALLS] [",
    before='{"name": "',
    between='", "arguments": ',
    after="}",
    separator=", ",
    end="]",
)
"""Mistral's tokenizers up to v7: one list of calls."""

MISTRAL_ARGS = CallFormat(trigger="[TOOL_CALLS]", before="[TOOL_CALLS]", between="[ARGS]", after="")
"""Mistral's tokenizers from v11 on."""

LLAMA_JSON = CallFormat(
    trigger='{"name": "',
    before='{"name": "',
    between='", "parameters": ',
    after="}",
    separator="; ",
    is_whole=True,
)
"""Llama 3.1 to 3.3."""

DEEPSEEK = CallFormat(
    trigger="<｜tool▁calls▁begin｜>",
    begin="<｜tool▁calls▁begin｜>",
    before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    between="\n```json\n",
    after="\n```<｜tool▁call▁end｜>",
    separator="\n",
    end="<｜tool▁calls▁end｜>",
)
"""DeepSeek V3, R1, and what was distilled from it."""

DEEPSEEK_V31 = CallFormat(
    trigger="<｜tool▁calls▁begin｜>",
    begin="<｜tool▁calls▁begin｜>",
    before="<｜tool▁call▁begin｜>",
    between="<｜tool▁sep｜>",
    after="<｜tool▁call▁end｜>",
    end="<｜tool▁calls▁end｜>",
)

KIMI = CallFormat(
    trigger="<|tool_calls_section_begin|>",
    begin="<|tool_calls_section_begin|>",
    before="<|tool_call_begin|>functions.",
    between="<|tool_call_argument_begin|>",
    after="<|tool_call_end|>",
    end="<|tool_calls_section_end|>",
    is_numbered=True,
)
"""Kimi K2."""

PYTHONIC = CallFormat(
    trigger="[",
    begin="[",
    before="",
    between="(",
    after=")",
    separator=", ",
    end="]",
    arguments=PythonArguments(),
    is_whole=True,
)
"""Templates of Llama 3.2, Llama 4 and Gemma 3 that ask for a list of calls in Python."""

HARMONY = Channels(
    begin="<|start|>assistant",
    channel="<|channel|>",
    body="<|message|>",
    end="<|end|>",
    ends=("<|call|>", "<|return|>"),
    recipient=" to=functions.",
    forms=(" <|constrain|>json", "<|constrain|>json", " json"),
    reasoning="analysis",
    aside="commentary",
    answer="final",
)
"""gpt-oss."""

_REASONING = (Marks("<think>", "</think>"), Marks("[THINK]", "[/THINK]"), Marks("◁think▷", "◁/think▷"))

_CALLS: Sequence[tuple[Callable[[str], bool], CallFormat]] = (
    (lambda source: DEEPSEEK.trigger in source and "```json" in source, DEEPSEEK),
    (lambda source: DEEPSEEK_V31.trigger in source, DEEPSEEK_V31),
    (lambda source: KIMI.trigger in source, KIMI),
    (lambda source: "[TOOL_CALLS]" in source and "[ARGS]" in source, MISTRAL_ARGS),
    (lambda source: "[TOOL_CALLS]" in source, MISTRAL_LIST),
    (lambda source: "<arg_key>" in source, GLM),
    (lambda source: "<function=" in source and "<parameter=" in source, QWEN_CODER),
    (lambda source: "<tool_call>" in source, HERMES),
    (lambda source: re.search(r"\[\w+\(\w+=\w+, ", source) is not None, PYTHONIC),
    (lambda source: re.search(r"""["']parameters\\?["']: ?dictionary""", source) is not None, LLAMA_JSON),
)
"""Known dialects with the test of a chat template's source that chooses each; the first that is true."""


def dialect_of(source: str | None) -> Dialect:
    """Return the dialect of a model by its chat template.

    Args:
        source: The template, in Jinja; None: the model has none.
    """
    source = source or ""
    if all(mark in source for mark in (HARMONY.begin, HARMONY.channel, HARMONY.body)):
        return Dialect(channels=HARMONY, tools=ToolsInPrompt.ONE_BY_ONE)
    reasoning = next((marks for marks in _REASONING if marks.end in source), None)
    if not re.search(r"\btools\b", source):
        return Dialect(reasoning, HERMES, ToolsInPrompt.WRITTEN_OUT)
    calls = next((calls for holds, calls in _CALLS if holds(source)), None)
    tools = ToolsInPrompt.NATIVE
    if calls in (DEEPSEEK, DEEPSEEK_V31):
        tools = ToolsInPrompt.AS_SENT
    elif calls is LLAMA_JSON:  # its templates refuse messages with several calls
        tools = ToolsInPrompt.ONE_BY_ONE
    return Dialect(reasoning, calls, tools, short_ids=calls in (MISTRAL_LIST, MISTRAL_ARGS))
