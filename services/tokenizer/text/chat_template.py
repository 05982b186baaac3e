"""Chat templates: Jinja in a sandbox, with the dialect that models' templates are written in.

A template belongs to the model, so it is as trustworthy as the publisher of the weights. The sandbox denies it access
to the interpreter, and this module limits the size of its output. Its time and memory are limited by `chat_renderer`,
which runs it in a process that can be killed.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from scalellm.services.tokenizer.text.chat_template_error import ChatTemplateError

_MAX_REASON_CHARS = 200
"""Most characters of a template's refusal, which may quote the conversation; a status message must fit into a
header."""

_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of the last message when the answer continues it. The text is that of transformers, because a template
may examine the content that it writes."""


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - the interface of Jinja's Extension

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse one block; assignments stay inside, as in a macro's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _SafeNamespace(Namespace):
    """`namespace()` that cannot hold underscore attributes, which are a way out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # "self" may be among the attributes
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_attribute(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The Jinja source.
        special_tokens: Variables of the template besides the messages: `bos_token` and the like.
        max_chars: Limit on the output, in characters.

    Raises ChatTemplateError when the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, max_chars: int) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        del environment.globals["lipsum"]
        environment.globals.update(
            namespace=_SafeNamespace,
            dict=_make_dict,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
        )
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ChatTemplateError(f"the model's chat template is not valid, line {error.lineno}: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return the text that the model reads.

        Args:
            messages: JSON values only, at least `role` and `content` each.
            add_generation_prompt: Append the header of the assistant's answer.
            continue_final_message: Leave out what the template writes after the last message's content.
            tools: Functions that the model may call, JSON values only; None where there are none.
            documents: Documents that the model may look up, JSON values only; None where there are none.
            kwargs: Other variables of the template, JSON values only.

        Raises:
            ChatTemplateError: The template refuses the messages, fails, or writes more than the limit.
        """
        if continue_final_message:
            *before, last = messages
            messages = [*before, {**last, "content": last["content"] + _CONTINUED}]
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > self._max_chars:
                    raise ChatTemplateError(
                        f"the chat template writes more than the limit of {self._max_chars} characters"
                    )
                pieces.append(piece)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template refuses this conversation: {_shortened(error)}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template fails on this conversation: {_shortened(error)}") from error
        text = "".join(pieces)
        return _without_end(text, last["content"]) if continue_final_message else text


def _without_end(text: str, content: str) -> str:
    """Return `text` up to the mark behind the last message's content."""
    mark = _CONTINUED.strip()
    end = text.rfind(mark)
    if end < 0 or content.strip() not in text:
        raise ChatTemplateError("the chat template does not write the last message as it is: it cannot be continued")
    # A template that trims contents has trimmed the mark.
    return text[:end] if text.startswith(_CONTINUED, end) else text[:end].rstrip()


def _shortened(error: Exception) -> str:
    reason = str(error)
    return reason if len(reason) <= _MAX_REASON_CHARS else f"{reason[:_MAX_REASON_CHARS]}..."


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialise for a model, without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
