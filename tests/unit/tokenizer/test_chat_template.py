"""Chat templates against `transformers`, and what happens to templates that misbehave."""

import asyncio
import datetime
import os
import signal
from typing import Any

import grpc
import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.text import chat_renderer
from scalellm.services.tokenizer.text.chat_renderer import ChatRenderer, RenderLimits
from scalellm.services.tokenizer.text.chat_template import ChatTemplate
from scalellm.services.tokenizer.text.chat_template_error import ChatTemplateError
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer
from service_processes import PATIENCE

CHATML = """\
{%- if messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set rest = messages -%}
{%- endif -%}
{% for m in rest %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
{{- '' if tools is none else tools | tojson }}"""

INST = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] not in ['user', 'assistant'] %}
    {{ raise_exception('Only user and assistant roles are supported!') }}
{% elif (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Roles must alternate') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}
    {{- ' ' + message['content'] + eos_token }}
{% endif %}
{% endfor %}"""

TURNS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

THINKING = """\
{%- set ns = namespace(last_user=-1, seen=[]) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last_user < 0 %}
        {%- set ns.last_user = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.index0 > 3 %}{%- continue %}{%- endif %}
    {%- if message.role == 'nobody' %}{%- break %}{%- endif %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.role ~ ': ' ~ content }}{% endgeneration %}
    {%- else %}{{ {'role': message.role, 'text': content} | tojson }}
        {{ dict(a=loop.index0, b='<é>') | tojson(indent=2) }}
    {%- endif %}
{%- endfor %}
{{- ns.last_user }} {{ strftime_now('%Y') }} {{ range(3) | list }}"""

SWITCHED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if reasoning_effort is defined %}{{ 'Reasoning: ' + reasoning_effort + '\n' }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
{{- extra | default({}) | tojson }}{{ bos_token }}"""
"""Reads what Qwen3's and gpt-oss's templates read."""

TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "inst": INST,
    "turns": TURNS,
    "thinking": THINKING,
    "switched": SWITCHED,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CONVERSATIONS = [
    [("user", "Hi")],
    [
        ("user", "  What's 1 < 2 & 'x'?\n\n"),
        ("assistant", ' "Yes" <b>é</b> 😀 '),
        ("user", "数据 {{ 7 * 7 }} {% raw %}"),
    ],
    [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "<think>\nhm\n</think>\n\nHello"),
        ("user", "Bye"),
        ("user", "!"),
    ],
]


@pytest.fixture(scope="module")
def oracle(smollm2: ModelTokenizer) -> PreTrainedTokenizerFast:
    """Made once: it copies the whole vocabulary."""
    return PreTrainedTokenizerFast(tokenizer_object=smollm2.tokenizer, **SPECIAL)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ["smollm2", *TEMPLATES])
def test_renders_like_transformers(
    name: str,
    conversation: list[tuple[str, str]],
    add_generation_prompt: bool,
    smollm2: ModelTokenizer,
    oracle: PreTrainedTokenizerFast,
) -> None:
    source = smollm2.chat_template if name == "smollm2" else TEMPLATES[name]
    assert source is not None
    messages = [{"role": role, "content": content} for role, content in conversation]
    template = ChatTemplate(source, SPECIAL, max_chars=10_000)
    options: dict[str, Any] = {"chat_template": source, "add_generation_prompt": add_generation_prompt}
    try:
        expected = oracle.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        with pytest.raises(ChatTemplateError, match=str(error)):
            template.render(messages, add_generation_prompt=add_generation_prompt)
    else:
        assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected
        assert name != "thinking" or str(datetime.datetime.now().year) in expected


@pytest.mark.parametrize("content", ["The answer is", " It is  ", "", "<think>\nhm\n</think>\n\nSo"])
@pytest.mark.parametrize("name", ["smollm2", *TEMPLATES])
def test_goes_on_with_the_last_message_like_transformers(
    name: str, content: str, smollm2: ModelTokenizer, oracle: PreTrainedTokenizerFast
) -> None:
    source = smollm2.chat_template if name == "smollm2" else TEMPLATES[name]
    assert source is not None
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": content}]
    template = ChatTemplate(source, SPECIAL, max_chars=10_000)
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    try:
        expected = oracle.apply_chat_template(messages, tokenize=False, chat_template=source, **options)
    except ValueError:
        with pytest.raises(ChatTemplateError, match="cannot be continued"):
            template.render(messages, **options)
    else:
        assert template.render(messages, **options) == expected
        assert expected.rstrip().endswith(content.strip())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"enable_thinking": False},
        {"enable_thinking": True, "reasoning_effort": "high"},
        {"extra": {"é": [1, 2.5, None, True, "<x>"]}},
        {"bos_token": "<other>"},
        {"nobody_reads_this": 1, "range": [], "": "", "self": {}, "not a name": 1},
    ],
)
@pytest.mark.parametrize("name", ["smollm2", "switched"])
def test_passes_variables_like_transformers(
    name: str, kwargs: dict[str, Any], smollm2: ModelTokenizer, oracle: PreTrainedTokenizerFast
) -> None:
    source = smollm2.chat_template if name == "smollm2" else TEMPLATES[name]
    assert source is not None
    messages = [{"role": "user", "content": "Hi"}]
    template = ChatTemplate(source, SPECIAL, max_chars=10_000)
    passed = {name: value for name, value in kwargs.items() if name != "self"}  # which Python takes for its own there
    expected = oracle.apply_chat_template(
        messages, tokenize=False, chat_template=source, add_generation_prompt=True, **passed
    )
    assert template.render(messages, add_generation_prompt=True, kwargs=kwargs) == expected


async def test_renders_in_the_child_process(smollm2: ModelTokenizer) -> None:
    assert smollm2.chat_template is not None
    inline = ChatTemplate(smollm2.chat_template, smollm2.special_tokens, max_chars=10_000)
    conversations = [[{"role": "user", "content": f"{i} é😀\u0000\n" * i}] for i in range(30)]
    async with ChatRenderer(smollm2.chat_template, smollm2.special_tokens) as renderer:
        rendered = await asyncio.gather(*(renderer.render(messages) for messages in conversations))
        assert rendered == [inline.render(messages, add_generation_prompt=True) for messages in conversations]
        options: dict[str, Any] = {
            "add_generation_prompt": False,
            "continue_final_message": True,
            "kwargs": {"bos_token": "é\ud83d\ude00"},
        }
        assert await renderer.render(conversations[1], **options) == inline.render(conversations[1], **options)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than the limit"),
        ("{{ 'x' | center(10 ** 10) }}", "memory"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}0123456789{% endfor %}", "more than the limit of 5000 characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "cannot hold"),
        ("{{ messages.append(1) }}", "."),
        ("{{ messages[7].content + 1 }}", "refuses|fails"),
        ("{{ raise_exception('no such role') }}", "refuses this conversation: no such role"),
    ],
)
async def test_a_bad_template_is_an_error_and_the_next_render_works(source: str, reason: str) -> None:
    source = "{% if messages[0].content == 'bad' %}" + source + "{% else %}fine{% endif %}"
    seconds = 1.0 if reason == "longer than the limit" else PATIENCE
    limits = RenderLimits(time_limit=seconds, max_chars=5000, memory_bytes=300 << 20)
    async with ChatRenderer(source, {}, limits) as renderer:
        with pytest.raises(ChatTemplateError, match=reason):
            await renderer.render([{"role": "user", "content": "bad"}])
        assert await renderer.render([{"role": "user", "content": "good"}]) == "fine"


@pytest.mark.parametrize("quotes", ["{{ raise_exception(messages[0].content) }}", "{{ {}[messages[0].content] + 1 }}"])
def test_a_refusal_fits_a_status_message(quotes: str) -> None:
    template = ChatTemplate(quotes, {}, max_chars=100)
    with pytest.raises(ChatTemplateError) as refusal:
        template.render([{"role": "user", "content": "é" * 10_000}], add_generation_prompt=True)
    assert len(str(refusal.value)) < 300


async def test_a_cancelled_render_does_not_disturb_the_next() -> None:
    async with ChatRenderer("{{ messages[0].content }}", {}) as renderer:
        task = asyncio.create_task(renderer.render([{"role": "user", "content": "first" * 1000}]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await renderer.render([{"role": "user", "content": "second"}]) == "second"


SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


async def test_callers_take_turns_and_those_that_have_gone_are_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    kills = 0  # one for each slow render that was begun
    kill = ChatRenderer._kill

    async def counted(renderer: ChatRenderer) -> None:
        nonlocal kills
        kills += 1
        await kill(renderer)

    monkeypatch.setattr(ChatRenderer, "_kill", counted)
    source = "{% if messages[0].content == 'slow' %}" + SLOW + "{% else %}fine{% endif %}"
    async with ChatRenderer(source, {}, RenderLimits(time_limit=0.3)) as renderer:

        def slow(caller: str) -> asyncio.Task[str]:
            return asyncio.create_task(renderer.render([{"role": "user", "content": "slow"}], caller=caller))

        hungry, gone = [slow("hungry") for _ in range(3)], [slow("gone") for _ in range(20)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        assert await renderer.render([{"role": "user", "content": "good"}], caller="quiet") == "fine"
        assert kills <= 2
        await asyncio.wait([*hungry, *gone])
        assert kills == len(hungry)


async def test_a_stopped_child_is_waited_for_and_a_killed_one_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is the caller's fault, nor is a machine that gives the child no CPU for longer than the limit."""
    conversation = [{"role": "user", "content": "fine"}]
    async with ChatRenderer("{{ messages[0].content }}", {}, RenderLimits(time_limit=0.2)) as renderer:
        stopped = renderer._child
        assert stopped is not None
        os.kill(stopped.pid, signal.SIGSTOP)
        late = asyncio.create_task(renderer.render(conversation))
        await asyncio.sleep(0.5)
        assert not late.done()
        os.kill(stopped.pid, signal.SIGCONT)
        assert await late == "fine"
        os.kill(stopped.pid, signal.SIGSTOP)
        again = asyncio.create_task(renderer.render(conversation))
        await asyncio.sleep(0.1)
        os.kill(stopped.pid, signal.SIGKILL)
        assert await again == "fine"
        monkeypatch.setattr(chat_renderer, "_STALL_SECONDS", 0.2)
        assert renderer._child is not None
        os.kill(renderer._child.pid, signal.SIGSTOP)
        with pytest.raises(StatusError) as refused:
            await renderer.render(conversation)
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        assert refused.value.retry_after is not None
        monkeypatch.undo()
        assert await renderer.render(conversation) == "fine"


async def test_the_child_is_told_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@localhost")
    monkeypatch.setenv("SCALELLM_TOKENIZER_SALT_SECRET", "hunter2")
    async with ChatRenderer("{{ messages[0].content }}", {}) as renderer:
        assert renderer._child is not None
        environment = psutil.Process(renderer._child.pid).environ()
    assert "PATH" in environment
    assert not any("hunter2" in value for value in environment.values())


async def test_closing_ends_a_running_render() -> None:
    async with ChatRenderer(SLOW, {}, RenderLimits(time_limit=60)) as renderer:
        task = asyncio.create_task(renderer.render([]))
        await asyncio.sleep(0.05)
        child = renderer._child
    assert child is not None
    assert not child.is_running
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_invalid_jinja_is_refused_at_the_start() -> None:
    with pytest.raises(ChatTemplateError, match="not valid, line 1"):
        async with ChatRenderer("{% for %}", {}):
            pass
