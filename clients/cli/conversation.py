"""A conversation that the server keeps, as `scalellm chat` carries it on."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import grpc

from scalellm.cli.answer_view import AnswerView
from scalellm.cli.context import CliContext, CliError, ExitCode
from scalellm.cli.generate import run_streaming, warn_about_session
from scalellm.cli.generation import Generation
from scalellm.cli.latency import print_breakdown
from scalellm.client import Client, ClientError
from scalellm.services.common.field_rules import SAMPLING
from scalellm.v1.common_pb2 import FINISH_REASON_STOP
from scalellm.v1.generation_pb2 import ON_DISCONNECT_KEEP, Chat, ChatMessage, GenerateRequest, ToolCall
from scalellm.v1.sessions_pb2 import Session

SETTINGS = MappingProxyType(
    {name: rule for name, rule in SAMPLING.items() if name not in ("n", "ignore_eos", "logprobs", "prompt_logprobs")}
)
"""Settings of `/set`: the sampling fields that make sense in a chat."""


class Conversation:
    """A session on the server and what to send with each of its turns.

    Args:
        context: The invocation.
        client: The server.
        session_id: The session to go on with, or to begin; empty: a new one.
        model: Model that answers; empty: that of the session, or the server's default.
        system: Instructions for a new conversation; empty: none.
        offered: Has the tools of each turn.
        settings: Sampling parameters that replace the server's defaults.
        timeout: Deadline of an answer, in seconds; None: none.
        write: Gets the answers' text.
        view: Gets the parts of answers that are told apart.
        show_latency: Show where the time went.

    Attributes:
        calls: Calls of functions with which the last answer ended, and whose results the model waits for.
    """

    def __init__(
        self,
        context: CliContext,
        client: Client,
        session_id: str,
        *,
        model: str,
        system: str,
        offered: Chat,
        settings: Mapping[str, float],
        timeout: float | None,
        write: Callable[[str], None],
        view: AnswerView,
        show_latency: bool,
    ) -> None:
        self._context = context
        self._client = client
        self._model = model
        self._timeout = timeout
        self._write = write
        self._view = view
        self._settings = dict(settings)
        self._offered = offered
        self.system = system
        self.show_latency = show_latency
        self._unstored: list[ChatMessage] = []
        """Messages of turns that were interrupted, answers included: nobody but us has them."""
        self._last_sent: list[ChatMessage] = []
        self.calls: list[ToolCall] = []
        self._results: list[ChatMessage] = []
        """Results of the first of the calls; they are sent together."""
        self._go_to(session_id)

    def begin(self) -> None:
        """Begin a new conversation."""
        self._go_to("")

    def turn(self, text: str) -> None:
        """Send one message and print the answer as it comes.

        An answer that is interrupted is kept as far as it was printed: it is sent along with the next message, as the
        server stores no turn that did not end. Raises ClientError, KeyboardInterrupt.
        """
        self._send([*self._unstored, ChatMessage(role="user", content=text)])

    @property
    def next_call(self) -> ToolCall | None:
        """The call whose result is to be given next; None: the model waits for none."""
        return self.calls[len(self._results)] if self.calls else None

    def give_result(self, text: str) -> None:
        """Give what the function of the next call returned; with the last one print the answer. Raises as `turn`."""
        call = self.next_call
        assert call is not None
        results = [*self._results, ChatMessage(role="tool", tool_call_id=call.id, content=text)]
        if len(results) == len(self.calls):
            self._results = []  # asked for again if they do not reach the server
            self._send(results)
        else:
            self._results = results

    def skip_calls(self) -> None:
        """Go on without the results of the calls."""
        self._wait_for([])

    def retry(self) -> None:
        """Ask the last message again, in place of its answer. Raises ClientError, CliError, KeyboardInterrupt."""
        if self._unstored:
            kept, self._unstored = self._unstored, []
            self._send(kept[:-1])  # without the answer that was interrupted
            return
        messages = self._last_sent or self._last_on_server()
        if not messages:
            raise CliError("nothing was said yet", ExitCode.USAGE)
        self._take_back()
        self._send(messages)

    def set(self, name: str, value: str) -> None:
        """Change how answers are drawn; "default" leaves it to the server. Raises CliError."""
        if name not in SETTINGS:
            raise CliError(f"no setting {name!r}; there are: {', '.join(SETTINGS)}", ExitCode.USAGE)
        if value == "default":
            self._settings.pop(name, None)
            return
        rule = SETTINGS[name]
        try:
            number = rule.kind(value)
        except ValueError:
            kind = "a whole number" if rule.kind is int else "a number"
            raise CliError(f"{name}: {value!r} is not {kind}", ExitCode.USAGE) from None
        if fault := rule.fault(number):
            raise CliError(f"{name}: {fault}", ExitCode.USAGE)
        self._settings[name] = number

    def settings(self) -> dict[str, float]:
        """Return what was set, by name."""
        return dict(self._settings)

    def read(self) -> Session | None:
        """Return the conversation as the server has it, None where nothing was said. Raises ClientError."""
        session = self._client.get_session(self.session_id) if self.turns else Session(session_id=self.session_id)
        session.messages.extend(self._unstored)
        return session if session.messages else None

    def _go_to(self, session_id: str) -> None:
        self.session_id = session_id or f"chat-{secrets.token_hex(4)}"
        session = find_session(self._client, session_id) if session_id else None
        self.turns = session.num_turns if session is not None else 0
        self._unstored = []
        self._last_sent = []
        self._wait_for(session.messages[-1].tool_calls if session is not None and session.messages else [])

    def _wait_for(self, calls: Iterable[ToolCall]) -> None:
        self.calls = list(calls)
        self._results = []

    def _send(self, messages: Sequence[ChatMessage]) -> None:
        if self.system and self.turns == 0 and messages[0].role != "system":
            messages = [ChatMessage(role="system", content=self.system), *messages]
        request = GenerateRequest(
            model=self._model,
            chat=self._offered,
            session_id=self.session_id,
            on_disconnect=ON_DISCONNECT_KEEP,
        )
        request.chat.messages.extend(messages)
        request.reasoning.SetInParent()
        for name, value in self._settings.items():
            setattr(request.sampling, name, value)
        generation = Generation()
        try:
            run_streaming(
                self._client,
                request,
                generation,
                is_streamed=True,
                timeout=self._timeout,
                write=self._write,
                show=self._view.show,
            )
        except KeyboardInterrupt:
            said = generation.samples[0].text if generation.samples else ""
            if said.strip():
                self._unstored = [*messages, ChatMessage(role="assistant", content=said)]
                self._wait_for([])
            raise
        finally:
            self._view.end()
        self._unstored = []
        self._last_sent = list(messages)
        self._wait_for(_complete_calls(generation))
        if generation.started.session_turns < self.turns:
            self._context.warn("the server had forgotten the conversation (its time was up); it begins anew here")
        self.turns = generation.started.session_turns + 1
        warn_about_session(self._context, generation)
        if self.show_latency:
            print_breakdown(self._context.err, generation.finished, generation.measured_ns)

    def _take_back(self) -> None:
        """Remove the last turn from the session, which keeps its name."""
        if self.turns > 1:
            shorter = f"{self.session_id[:100]}-{secrets.token_hex(4)}"
            self._client.fork_session(self.session_id, shorter, num_turns=self.turns - 1)
            self._client.delete_session(self.session_id)
            self._client.fork_session(shorter, self.session_id)
            self._client.delete_session(shorter)
        else:
            self._client.delete_session(self.session_id)
        self.turns -= 1

    def _last_on_server(self) -> list[ChatMessage]:
        """The messages of the last turn of a session that was begun elsewhere, as far as they can be told apart."""
        if not self.turns:
            return []
        messages = list(self._client.get_session(self.session_id).messages)[:-1]
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        return messages[answers[-1] + 1 :] if self.turns > 1 and answers else messages


def _complete_calls(generation: Generation) -> list[ToolCall]:
    """Return the calls of an answer; none where it was cut off, perhaps within one."""
    if not generation.samples or generation.finished.samples[0].reason != FINISH_REASON_STOP:
        return []
    return [ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in generation.samples[0].calls]


def find_session(client: Client, session_id: str) -> Session | None:
    """Return a session, None where the server has none of this name. Raises ClientError."""
    try:
        return client.get_session(session_id)
    except ClientError as error:
        if error.code is grpc.StatusCode.NOT_FOUND:
            return None
        raise
