"""An answer of reasoning, text and calls on a terminal."""

from __future__ import annotations

from scalellm.cli.answer_view import AnswerView, calls_of
from scalellm.v1.generation_pb2 import DeltaPart, ToolCall, ToolCallDelta


def call(arguments: str, call_id: str = "", name: str = "") -> DeltaPart:
    return DeltaPart(tool_call=ToolCallDelta(id=call_id, name=name, arguments=arguments))


def test_parts_are_shown_apart() -> None:
    told: list[str] = []
    view = AnswerView(told.append, lambda text: told.append(f"~{text}~"))
    for part in (
        *(DeltaPart(reasoning="Hm"), DeltaPart(reasoning=".")),
        *(DeltaPart(text="I "), DeltaPart(text="look.")),
        *(call("{", "1", "now"), call("}"), call("{}", "2", "get")),
    ):
        view.show(part)
    view.end()
    view.show(DeltaPart(text="Next."))
    assert "".join(told) == "~Hm~~.~~\n\n~I look.\nnow {}\nget {}Next."


def test_calls_of_a_message_stand_below_its_text() -> None:
    calls = [ToolCall(id="1", name="now", arguments="{}"), ToolCall(id="2", name="get", arguments='{"a": 1}')]
    assert calls_of(calls) == '\nnow {}\nget {"a": 1}'
    assert calls_of([]) == ""
