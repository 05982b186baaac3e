"""The description of how a model writes reasoning and function calls.

Data only: `constraint` makes a grammar of it, and `splitter` reads what was written by it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Marks:
    """Texts around the reasoning, which comes before all else."""

    begin: str
    end: str


@dataclass(frozen=True, slots=True)
class JsonArguments:
    """Arguments are one JSON object."""


@dataclass(frozen=True, slots=True)
class TaggedArguments:
    """Arguments are written one after the other, each as `before` key `between` value `after`.

    A value that is a string by its schema is written as it is, any other one as JSON.
    """

    before: str
    between: str
    after: str


@dataclass(frozen=True, slots=True)
class PythonArguments:
    """Arguments are those of a call in Python: key `=` value, with `, ` between them.

    Values are literals of Python or JSON: both `True` and `true` are read.
    """


@dataclass(frozen=True, slots=True)
class CallFormat:
    """The form of calls: `begin` call (`separator` call)* `end`, where a call is `before` name `between` arguments
    `after`.

    Attributes:
        trigger: Text with which calls, and nothing else, begin: the first characters of `begin` and `before`.
        arguments: The form of arguments.
        is_numbered: True if a name is followed by `:` and a number, and the id of a call is `functions.` name `:`
            number.
        is_whole: True if an answer with calls consists of calls alone.
    """

    trigger: str
    before: str
    between: str
    after: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    arguments: JsonArguments | TaggedArguments | PythonArguments = field(default_factory=JsonArguments)
    is_numbered: bool = False
    is_whole: bool = False

    @property
    def opening(self) -> str:
        """The text before the first name."""
        return self.begin + self.before


@dataclass(frozen=True, slots=True)
class Channels:
    """An answer is a list of messages, each `header` `body` text, where the header names the channel: `channel` name.

    A call is the last message. Its header also has `recipient` and the function's name, before the channel or behind
    it, and may end in one of `forms`; its text is the arguments, one JSON object.

    Attributes:
        begin: Before a header; the prompt has that of the first message.
        channel: Before the name of a channel.
        body: Between header and text.
        end: Behind a text that another message follows.
        ends: Behind the last text.
        recipient: Before the name of a function.
        forms: Ways to say that the text is JSON, one of which may be written.
        reasoning: Name of the channel for reasoning.
        aside: Name of the channel for calls, and for text before them.
        answer: Name of the channel for the answer itself.
    """

    begin: str
    channel: str
    body: str
    end: str
    ends: Sequence[str]
    recipient: str
    forms: Sequence[str]
    reasoning: str
    aside: str
    answer: str

    def header(self, channel: str) -> str:
        """Return all that is written before the text of a message that is no call."""
        return self.channel + channel + self.body

    @property
    def marks(self) -> Sequence[str]:
        """All texts in which special tokens are."""
        return (self.begin, self.channel, self.body, self.end, *self.ends, *self.forms)


class ToolsInPrompt(enum.Enum):
    """The form in which tools, calls and results are given to a model."""

    NATIVE = enum.auto()
    """The template gets them as objects: arguments are objects."""
    AS_SENT = enum.auto()
    """The template gets them as OpenAI's messages: arguments are JSON texts; a message without text has null."""
    ONE_BY_ONE = enum.auto()
    """As native, but a message has one call at most, and either text or reasoning beside it, as `thinking`."""
    WRITTEN_OUT = enum.auto()
    """The template knows no tools: they are written into messages."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """A model's format of reasoning and calls.

    Attributes:
        reasoning: Marks around its reasoning; None: it has none, or in an unknown format.
        calls: Its format of calls; None: it has none, or an unknown one.
        tools: The form in which it gets tools.
        short_ids: True if ids of calls must be nine letters and digits, since its template refuses others.
        channels: Its form of messages, where an answer consists of several: reasoning and calls are among them, and
            `reasoning` and `calls` are None.
    """

    reasoning: Marks | None = None
    calls: CallFormat | None = None
    tools: ToolsInPrompt = ToolsInPrompt.NATIVE
    short_ids: bool = False
    channels: Channels | None = None

    @property
    def tells_reasoning(self) -> bool:
        """True if its reasoning can be separated from text."""
        return self.reasoning is not None or self.channels is not None

    @property
    def tells_calls(self) -> bool:
        """True if its calls can be separated from text."""
        return self.calls is not None or self.channels is not None

    @property
    def end_of_reasoning(self) -> str | None:
        """The mark after its reasoning; None: it has no reasoning, or in an unknown format."""
        if self.channels is not None:
            return self.channels.end
        return None if self.reasoning is None else self.reasoning.end

    def marker_ids(self, special_ids: Mapping[str, int]) -> frozenset[int]:
        """Return the special tokens that are marks of reasoning and calls.

        Args:
            special_ids: The model's special tokens, by their texts.
        """
        texts = [] if self.reasoning is None else [self.reasoning.begin, self.reasoning.end]
        if (calls := self.calls) is not None:
            texts += [calls.begin, calls.before, calls.between, calls.after, calls.separator, calls.end]
            if isinstance(arguments := calls.arguments, TaggedArguments):
                texts += [arguments.before, arguments.between, arguments.after]
        if self.channels is not None:
            texts += self.channels.marks
        return frozenset(
            token_id for special, token_id in special_ids.items() if special and any(special in text for text in texts)
        )
