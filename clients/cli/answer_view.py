"""An answer on the terminal while it comes: its text as it is, reasoning dimmed, calls of functions by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scalellm.v1.generation_pb2 import DeltaPart, ToolCall, ToolCallDelta


class AnswerView:
    """Shows the parts of one answer after the other.

    Args:
        write: Gets text, and calls.
        write_reasoning: Gets reasoning.
    """

    def __init__(self, write: Callable[[str], None], write_reasoning: Callable[[str], None]) -> None:
        self._write = write
        self._write_reasoning = write_reasoning
        self._kind: str | None = None

    def show(self, part: DeltaPart) -> None:
        """Show one part."""
        kind = part.WhichOneof("part")
        call = part.tool_call
        if self._kind is not None and (kind != self._kind or call.id):
            writer = self._write_reasoning if self._kind == "reasoning" else self._write
            writer("\n\n" if kind == "text" else "\n")
        self._kind = kind
        if kind == "reasoning":
            self._write_reasoning(part.reasoning)
        elif kind == "text":
            self._write(part.text)
        else:
            self._write(f"{call.name} {call.arguments}" if call.id else call.arguments)

    def end(self) -> None:
        """The answer has ended, or what there is of it: the next one begins anew."""
        self._kind = None


def calls_of(calls: Iterable[ToolCall | ToolCallDelta]) -> str:
    """Return calls as lines; empty without any."""
    return "".join(f"\n{call.name} {call.arguments}" for call in calls)
