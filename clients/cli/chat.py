"""`scalellm chat`: a conversation that the server remembers."""

from __future__ import annotations

import secrets
import sys
from typing import Annotated

import grpc
import typer
from rich.text import Text

from clients.cli.context import MAX_UINT32, CliContext, CliError, check_timeout, explain
from clients.cli.generate import run_streaming, warn_about_session
from clients.cli.generation import Generation
from clients.cli.latency import print_breakdown
from clients.cli.output import one_line, write_text
from clients.cli.text import require_utf8
from clients.client import Client, ClientError
from scalellm.v1.generation_pb2 import Chat, ChatMessage, GenerateRequest

HELP = """Talk with the model, turn by turn, on a session that the server keeps.

Each turn sends only what is new; the server computes only the new tokens. Ctrl-C ends an answer; at the
prompt it ends the chat. In a pipe, each line is a turn and the answers are all that is printed.

\b
Examples:
  scalellm chat
  scalellm chat --system "Answer in one sentence." --session trip
  printf 'My name is Ada.\\nWhat is my name?\\n' | scalellm chat
"""

COMMANDS = """\
/help     this list
/history  the conversation so far, as the server has it
/new      forget the conversation and begin another one
/latency  show, or stop showing, where the time went after each answer
/exit     leave (also /quit, Ctrl-D)"""


def chat(
    ctx: typer.Context,
    session: Annotated[
        str, typer.Option(metavar="ID", help="Continue this conversation, or name a new one.", show_default=False)
    ] = "",
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="Instructions for a new conversation.", show_default=False)
    ] = "",
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_UINT32, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token each time.")] = 0.7,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Deadline of an answer.", show_default=False)
    ] = None,
    show_latency: Annotated[bool, typer.Option("--show-latency", help="Show where the time went.")] = False,
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Server to call.", show_default=False)] = "",
) -> None:
    """Loop over turns."""
    check_timeout(timeout)
    context = CliContext.of(ctx)
    with context.connect(address) as client:
        model = one_line(client.info().model)
        conversation = _Conversation(
            context, client, session, system, max_tokens, temperature, timeout, show_latency=show_latency
        )
        if sys.stdin.isatty():
            context.note(f"{model}, session {conversation.session_id}. /help lists what else there is, /exit leaves.")
            try:
                _talk(context, conversation)
            except KeyboardInterrupt:
                write_text("\n")  # the terminal's next line begins at its start
                raise
            finally:
                if conversation.turns:
                    context.note(f"continue with: scalellm chat --session {conversation.session_id}")
        else:
            for number, line in enumerate(sys.stdin, start=1):
                if line.strip():
                    require_utf8(line, f"line {number} of standard input")
                    conversation.turn(line.removesuffix("\n"))


def _talk(context: CliContext, conversation: _Conversation) -> None:
    """Read turns from the terminal until /exit or Ctrl-D."""
    import readline  # noqa: F401  # line editing and history for input(), on a terminal only

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            write_text("\n")
            break
        if line in ("/exit", "/quit"):
            break
        if line.startswith("/"):
            _command(context, conversation, line)
        elif line:
            try:
                require_utf8(line, "line")
                conversation.turn(line)
            except CliError as error:
                context.error(str(error))
            except KeyboardInterrupt:
                context.note("(stopped; this turn is not kept)")
            except ClientError as error:
                if error.unreachable:
                    raise
                context.error(explain(error)[0])


def _command(context: CliContext, conversation: _Conversation, line: str) -> None:
    match line:
        case "/help":
            context.out.print(Text(COMMANDS))
        case "/history":
            conversation.print_history()
        case "/new":
            conversation.begin("")
            context.note(f"a new conversation, session {conversation.session_id}")
        case "/latency":
            conversation.show_latency = not conversation.show_latency
            context.note(f"latency breakdown {'on' if conversation.show_latency else 'off'}")
        case _:
            context.error(f"unknown command {line}; /help lists those there are")


class _Conversation:
    """A session on the server and what to send with each of its turns."""

    def __init__(
        self,
        context: CliContext,
        client: Client,
        session_id: str,
        system: str,
        max_tokens: int,
        temperature: float,
        timeout: float | None,
        *,
        show_latency: bool,
    ) -> None:
        self._context = context
        self._client = client
        self._system = system
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._timeout = timeout
        self.show_latency = show_latency
        self.begin(session_id)

    def begin(self, session_id: str) -> None:
        """Go to a session: the given one, whether it exists or not, or a new one."""
        self.session_id = session_id or f"chat-{secrets.token_hex(4)}"
        self.turns = self._turns_on_server() if session_id else 0

    def turn(self, text: str) -> None:
        """Send one message and print the answer as it comes. Raises ClientError."""
        roles = [("user", text)]
        if self._system and self.turns == 0:
            roles.insert(0, ("system", self._system))
        request = GenerateRequest(
            chat=Chat(messages=[ChatMessage(role=role, content=content) for role, content in roles]),
            session_id=self.session_id,
        )
        request.sampling.max_tokens = self._max_tokens
        request.sampling.temperature = self._temperature
        generation = Generation()
        run_streaming(self._client, request, generation, is_streamed=True, timeout=self._timeout)
        if generation.started.session_turns < self.turns:
            self._context.warn("the server had forgotten the conversation (its time was up); it begins anew here")
        self.turns = generation.started.session_turns + 1
        warn_about_session(self._context, generation)
        if self.show_latency:
            print_breakdown(self._context.err, generation.finished, generation.measured_ns)

    def print_history(self) -> None:
        """Print the conversation as the server has it."""
        if self.turns == 0:
            self._context.note("nothing was said yet")
            return
        try:
            messages = self._client.get_session(self.session_id).messages
        except ClientError as error:
            self._context.error(explain(error)[0])
            return
        for message in messages:
            text = Text.assemble((f"{one_line(message.role)}: ", "bold"), message.content)
            self._context.out.print(text, soft_wrap=True)

    def _turns_on_server(self) -> int:
        try:
            return self._client.get_session(self.session_id).num_turns
        except ClientError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return 0
            raise
