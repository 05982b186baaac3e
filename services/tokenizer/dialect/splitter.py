"""Splits a streamed answer into reasoning, text and calls. Pure: no tokens, no clock.

The result does not depend on how the text was cut: consecutive parts of one kind, put together, are the same. The
beginning of a mark is held back until it is certain whether it is one.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping

from scalellm.services.tokenizer.dialect.arguments import JsonReader, TaggedReader
from scalellm.services.tokenizer.dialect.channel_splitter import ChannelSplitter
from scalellm.services.tokenizer.dialect.dialect import CallFormat, Dialect, PythonArguments, TaggedArguments
from scalellm.services.tokenizer.dialect.opening import Opening
from scalellm.services.tokenizer.dialect.parts import Part, PartKind, num_begun
from scalellm.services.tokenizer.dialect.python_reader import PythonReader


class _State(enum.Enum):
    START = enum.auto()
    REASONING = enum.auto()
    TEXT = enum.auto()
    NAME = enum.auto()
    ARGUMENTS = enum.auto()
    AFTER = enum.auto()
    """A call's arguments are complete."""
    BETWEEN = enum.auto()
    """A call is complete: another one, or the end of all calls, may follow."""


class Splitter:
    """Splits one answer. Not safe for concurrent use.

    Args:
        dialect: The answer's dialect.
        opening: The part in which it begins.
        has_calls: True if it may have calls; otherwise, text that looks like a call is text.
        make_id: Returns the id of a call, by its number.
        texts_of: Returns which arguments of a function are strings, by its name; needed for tagged arguments.

    Attributes:
        num_calls: Calls so far.
    """

    def __init__(
        self,
        dialect: Dialect,
        opening: Opening,
        *,
        has_calls: bool,
        make_id: Callable[[int], str],
        texts_of: Callable[[str], Mapping[str, bool]] = lambda name: {},
    ) -> None:
        self._marks = dialect.reasoning
        self._calls: CallFormat | None = dialect.calls if has_calls else None
        self._make_id = make_id
        self._texts_of = texts_of
        self._buffer = ""
        self._spaces = ""
        """White space after the returned text, which is dropped if a mark follows."""
        self._strips = False
        """True while white space is dropped, at the beginning of a part."""
        self._reader: JsonReader | TaggedReader | PythonReader | None = None
        self.num_calls = 0
        self._state = _State.TEXT if opening is Opening.BEHIND_REASONING or self._marks is None else _State.START
        self._is_open = opening is Opening.IN_REASONING
        self._steps = {
            _State.START: self._start,
            _State.REASONING: self._reasoning,
            _State.TEXT: self._text,
            _State.NAME: self._name,
            _State.ARGUMENTS: self._arguments,
            _State.AFTER: self._after,
            _State.BETWEEN: self._between,
        }

    def push(self, text: str) -> list[Part]:
        """Return the parts that are certain once `text` has been added to the answer."""
        if not text:
            return []
        self._buffer += text
        return self._run(is_last=False)

    def flush(self) -> list[Part]:
        """Return the rest, at the end of the answer. A call that has only begun is left out."""
        parts = self._run(is_last=True)
        if self._spaces and self._state in (_State.TEXT, _State.START, _State.REASONING):
            parts.append(Part(self._kind, self._spaces))
            self._spaces = ""
        return parts

    @property
    def is_in_reasoning(self) -> bool:
        """True if the next text is reasoning, or ends it."""
        return self._state is _State.REASONING or (self._state is _State.START and self._is_open)

    @property
    def is_behind_reasoning(self) -> bool:
        """True if no reasoning may follow."""
        return self._state not in (_State.START, _State.REASONING)

    @property
    def _kind(self) -> PartKind:
        return PartKind.REASONING if self._state is _State.REASONING else PartKind.TEXT

    def _run(self, *, is_last: bool) -> list[Part]:
        parts: list[Part] = []
        while self._steps[self._state](parts, is_last):
            pass
        return parts

    def _go_to(self, state: _State, rest: str) -> bool:
        """Go to another state after a mark, with the rest of the text. Returns True."""
        self._state, self._buffer, self._strips, self._spaces = state, rest, True, ""
        return True

    def _start(self, parts: list[Part], is_last: bool) -> bool:
        """Read the mark that begins reasoning, if the answer begins with it. Returns whether there is more to do."""
        assert self._marks is not None
        begun = self._buffer.lstrip()
        if begun.startswith(self._marks.begin):
            return self._go_to(_State.REASONING, begun[len(self._marks.begin) :])
        if self._marks.begin.startswith(begun) and not is_last:
            return False
        if self._is_open:
            return self._go_to(_State.REASONING, self._buffer)
        self._state = _State.TEXT
        return True

    def _reasoning(self, parts: list[Part], is_last: bool) -> bool:
        assert self._marks is not None
        place = self._buffer.find(self._marks.end)
        if place >= 0:
            self._tell(parts, self._buffer[:place])
            return self._go_to(_State.TEXT, self._buffer[place + len(self._marks.end) :])
        self._tell_but(parts, 0 if is_last else num_begun(self._buffer, self._marks.end))
        return False

    def _text(self, parts: list[Part], is_last: bool) -> bool:
        calls = self._calls
        if calls is None:
            self._tell_but(parts, 0)
            return False
        if calls.is_whole:
            return self._whole(calls, parts, is_last)
        place = self._buffer.find(calls.opening)
        if place >= 0:
            self._tell(parts, self._buffer[:place])
            return self._go_to(_State.NAME, self._buffer[place + len(calls.opening) :])
        held = num_begun(self._buffer, calls.opening)
        if is_last and held < len(calls.trigger):
            held = 0
        self._tell_but(parts, held)
        return False

    def _whole(self, calls: CallFormat, parts: list[Part], is_last: bool) -> bool:
        begun = self._buffer.lstrip()
        if begun.startswith(calls.opening):
            return self._go_to(_State.NAME, begun[len(calls.opening) :])
        if calls.opening.startswith(begun) and not is_last:
            return False
        self._calls = None
        return True

    def _name(self, parts: list[Part], is_last: bool) -> bool:
        calls = self._calls
        assert calls is not None
        name, found, rest = self._buffer.partition(calls.between)
        if not found:
            return False
        call_id = self._make_id(self.num_calls)
        if calls.is_numbered:
            call_id, name = f"functions.{name}", name.rpartition(":")[0] or name
        parts.append(Part(PartKind.CALL, "", self.num_calls, call_id, name))
        if isinstance(calls.arguments, TaggedArguments):
            self._reader = TaggedReader(calls.arguments, calls.after, self._texts_of(name))
        elif isinstance(calls.arguments, PythonArguments):
            self._reader = PythonReader(calls.after)
        else:
            self._reader = JsonReader()
        return self._go_to(_State.ARGUMENTS, rest)

    def _arguments(self, parts: list[Part], is_last: bool) -> bool:
        assert self._reader is not None
        told, rest = self._reader.read(self._buffer)
        if told:
            parts.append(Part(PartKind.CALL, told, self.num_calls))
        if self._reader.is_complete:
            self.num_calls += 1
            return self._go_to(_State.AFTER, rest)
        self._buffer = rest
        return False

    def _after(self, parts: list[Part], is_last: bool) -> bool:
        assert self._calls is not None
        after = self._calls.after
        if self._buffer.startswith(after):
            return self._go_to(_State.BETWEEN, self._buffer[len(after) :])
        if after.startswith(self._buffer):
            return False
        return self._go_to(_State.TEXT, self._buffer)

    def _between(self, parts: list[Part], is_last: bool) -> bool:
        calls = self._calls
        assert calls is not None
        following = calls.separator + calls.before
        if self._buffer.startswith(following):
            return self._go_to(_State.NAME, self._buffer[len(following) :])
        if calls.end and self._buffer.startswith(calls.end):
            return self._go_to(_State.TEXT, self._buffer[len(calls.end) :])
        if following.startswith(self._buffer) or calls.end.startswith(self._buffer):
            return False
        if calls.is_whole:
            self._calls = None
        return self._go_to(_State.TEXT, self._buffer)

    def _tell_but(self, parts: list[Part], held: int) -> None:
        """Add the buffered text, except for its last `held` characters, to `parts`."""
        end = len(self._buffer) - held
        told, self._buffer = self._buffer[:end], self._buffer[end:]
        self._tell(parts, told)

    def _tell(self, parts: list[Part], text: str) -> None:
        """Add more text of the current part to `parts`. White space at its end is held back until more follows."""
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        told = text.rstrip() if self._has_marks else text
        if told:
            parts.append(Part(self._kind, self._spaces + told))
            self._spaces = text[len(told) :]
        else:
            self._spaces += text

    @property
    def _has_marks(self) -> bool:
        """True if a mark may follow the part that is read."""
        return self._state is _State.REASONING or self._calls is not None


AnswerSplitter = Splitter | ChannelSplitter
"""A splitter of one answer."""


def make_splitter(
    dialect: Dialect,
    opening: Opening,
    *,
    has_calls: bool,
    make_id: Callable[[int], str],
    texts_of: Callable[[str], Mapping[str, bool]] = lambda name: {},
) -> AnswerSplitter:
    """Make the splitter for answers of a dialect. Arguments are those of Splitter."""
    if dialect.channels is not None:
        return ChannelSplitter(dialect.channels, opening, has_calls=has_calls, make_id=make_id)
    return Splitter(dialect, opening, has_calls=has_calls, make_id=make_id, texts_of=texts_of)
