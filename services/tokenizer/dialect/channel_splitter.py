"""Splits a streamed answer that consists of messages, each for a channel. Pure: no tokens, no clock.

As with `Splitter`, the result does not depend on how the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from scalellm.services.tokenizer.dialect.arguments import JsonReader
from scalellm.services.tokenizer.dialect.dialect import Channels
from scalellm.services.tokenizer.dialect.opening import Opening
from scalellm.services.tokenizer.dialect.parts import Part, PartKind, num_begun

_LONGEST_HEADER = 256
"""Most characters of a header. Longer text without a message's text is no header."""


class ChannelSplitter:
    """Splits one answer. Not safe for concurrent use.

    Consecutive messages of the same kind are separated by the end of a line. Anything that is no message is text.

    Args:
        channels: The answer's form of messages.
        opening: The part in which it begins.
        has_calls: True if it may have calls; otherwise, messages that look like calls are of their channel's kind.
        make_id: Returns the id of a call, by its number.

    Attributes:
        num_calls: Calls so far.
    """

    def __init__(self, channels: Channels, opening: Opening, *, has_calls: bool, make_id: Callable[[int], str]) -> None:
        self._channels = channels
        self._has_calls = has_calls
        self._make_id = make_id
        self._ends = (channels.end, *channels.ends, channels.begin)
        self._end = re.compile("|".join(map(re.escape, self._ends)))
        self._channel = re.compile(rf"{re.escape(channels.channel)}\s*([a-z]*)")
        self._recipient = re.compile(rf"{re.escape(channels.recipient)}([A-Za-z0-9._-]+)")
        self._heads = (channels.begin, channels.channel, channels.recipient)
        self._buffer = ""
        self._kind: PartKind | None = {
            Opening.ANYWHERE: None,
            Opening.IN_REASONING: PartKind.REASONING,
            Opening.BEHIND_REASONING: PartKind.TEXT,
        }[opening]
        """The kind of the part that is read; None: a header."""
        self._kinds_told: set[PartKind] = set()
        self._is_continued = False
        """True if a part of the message that is being read was returned."""
        self._reader: JsonReader | None = None
        self.num_calls = 0

    @property
    def is_in_reasoning(self) -> bool:
        """True if the next text is reasoning, or ends it."""
        return self._kind is PartKind.REASONING

    @property
    def is_behind_reasoning(self) -> bool:
        """False: a message with reasoning may always follow."""
        return False

    def push(self, text: str) -> list[Part]:
        """Return the parts that are certain once `text` has been added to the answer."""
        if not text:
            return []
        self._buffer += text
        return self._run(is_last=False)

    def flush(self) -> list[Part]:
        """Return the rest, at the end of the answer. A header that has only begun is left out."""
        return self._run(is_last=True)

    def _run(self, *, is_last: bool) -> list[Part]:
        parts: list[Part] = []
        while self._header(is_last) if self._kind is None else self._body(parts, is_last):
            pass
        return parts

    def _header(self, is_last: bool) -> bool:
        """Read a header. Returns whether there is more to do."""
        text = self._buffer
        place = text.find(self._channels.body, 0, _LONGEST_HEADER)
        is_one = text.startswith(self._heads)
        if is_one and place >= 0:
            self._begin(text[:place])
            self._buffer = text[place + len(self._channels.body) :]
            return True
        may_be_one = is_one or (not is_last and any(head.startswith(text) for head in self._heads))
        if may_be_one and len(text) < _LONGEST_HEADER:
            return False
        self._begin("")
        return True

    def _begin(self, header: str) -> None:
        """Begin to read a message with this header."""
        channel, recipient = self._channel.search(header), self._recipient.search(header)
        self._is_continued = False
        if recipient is not None and self._has_calls:
            self._kind, self._reader = PartKind.CALL, JsonReader()
            self._name = recipient[1]
        else:
            is_reasoning = channel is not None and channel[1] == self._channels.reasoning
            self._kind = PartKind.REASONING if is_reasoning else PartKind.TEXT

    def _body(self, parts: list[Part], is_last: bool) -> bool:
        """Read the text of a message. Returns whether there is more to do."""
        if self._kind is PartKind.CALL and self._read_arguments(parts):
            return False
        found = self._end.search(self._buffer)
        if found is None:
            held = 0 if is_last else max(num_begun(self._buffer, end) for end in self._ends)
            end = len(self._buffer) - held
            self._tell(parts, self._buffer[:end])
            self._buffer = self._buffer[end:]
            return False
        self._tell(parts, self._buffer[: found.start()])
        rest = found.start() if found[0] == self._channels.begin else found.end()
        self._buffer = self._buffer[rest:]
        self._kind = None
        return bool(self._buffer)

    def _read_arguments(self, parts: list[Part]) -> bool:
        """Return whether the arguments of a call go on."""
        if self._reader is None:
            return False
        if not self._is_continued:
            parts.append(Part(PartKind.CALL, "", self.num_calls, self._make_id(self.num_calls), self._name))
            self._is_continued = True
        told, self._buffer = self._reader.read(self._buffer)
        if told:
            parts.append(Part(PartKind.CALL, told, self.num_calls))
        if not self._reader.is_complete:
            return True
        self.num_calls += 1
        self._reader = None
        return False

    def _tell(self, parts: list[Part], text: str) -> None:
        kind = self._kind
        if not text or kind is None or kind is PartKind.CALL:  # what stands behind arguments is nothing
            return
        if not self._is_continued and kind in self._kinds_told:
            text = "\n" + text
        self._is_continued = True
        self._kinds_told.add(kind)
        parts.append(Part(kind, text))
