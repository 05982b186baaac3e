"""`scalellm chat`: a conversation that the server remembers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from scalellm.cli.answer_view import AnswerView
from scalellm.cli.context import MAX_UINT32, CliContext, CliError, ExitCode, ModelOption, check_timeout, explain
from scalellm.cli.conversation import Conversation, find_session
from scalellm.cli.line_input import LineInput
from scalellm.cli.output import one_line, write_text
from scalellm.cli.sessions import print_messages
from scalellm.cli.text import require_utf8
from scalellm.cli.tools import CHOICE_HELP, TOOLS_HELP, offer_tools
from scalellm.cli.word_wrap import WordWrap
from scalellm.client import ClientError
from scalellm.services.common.field_rules import SAMPLING
from scalellm.v1.generation_pb2 import Chat, ToolCall
from scalellm.v1.tokenizer_pb2 import GetInfoResponse

HELP = """Talk with the model, turn by turn, on a session that the server keeps.

Each turn sends only what is new; the server computes only the new tokens. What is pasted is one message, and
so is what stands between \"\"\" and \"\"\". Ctrl-C ends an answer, of which what was said is kept; at the prompt it
ends the chat. In a pipe, each line is a turn and the answers are all that is printed. On a terminal the
model's reasoning is shown dimmed. With --tools, a call is shown by the function's name and its arguments, and
on a terminal you are then asked for what the function returned.

\b
Examples:
  scalellm chat
  scalellm chat --tools tools.json
  scalellm chat --system "Answer in one sentence." --session trip
  printf 'My name is Ada.\\nWhat is my name?\\n' | scalellm chat
"""

COMMANDS = '''\
/help               this list
/history            the conversation so far, as the server has it
/new                forget the conversation and begin another one
/retry              ask the last message again, in place of its answer
/system [TEXT]      begin another conversation with these instructions; without TEXT: show them
/set [NAME VALUE]   how answers are drawn, such as /set temperature 0.2 (VALUE default: as the server does)
/skip               go on without the result of a function that is asked for
/latency            show, or stop showing, where the time went after each answer
"""                 begin a message of several lines; """ ends it
/exit               leave (also /quit, Ctrl-D)'''

_DEFAULT_TEMPERATURE = 0.7
"""Default for models without one of their own."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("chat", help=HELP, short_help="Talk with the model, on a session that the server keeps.")(chat)


def chat(
    ctx: typer.Context,
    *,
    model: ModelOption = "",
    session: Annotated[
        str, typer.Option(metavar="ID", help="Continue this conversation, or name a new one.", show_default=False)
    ] = "",
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="Instructions for a new conversation.", show_default=False)
    ] = "",
    tools: Annotated[Path | None, typer.Option(metavar="FILE", help=TOOLS_HELP, show_default=False)] = None,
    tool_choice: Annotated[str | None, typer.Option(metavar="CHOICE", help=CHOICE_HELP, show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_UINT32, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=SAMPLING["temperature"].low,
            max=SAMPLING["temperature"].high,
            help="0: the most likely token each time. Default: the model's own, or 0.7.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Deadline of an answer.", show_default=False)
    ] = None,
    show_latency: Annotated[bool, typer.Option("--show-latency", help="Show where the time went.")] = False,
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Server to call.", show_default=False)] = "",
) -> None:
    """Loop over turns."""
    check_timeout(timeout)
    context = CliContext.of(ctx)
    offered = Chat()
    offer_tools(offered, tools, tool_choice)
    wrap = WordWrap(write_text, lambda: context.out.width)

    def write(text: str) -> None:
        if sys.stdout.isatty():
            wrap.feed(text)
        else:
            write_text(text)

    thoughts = WordWrap(lambda text: context.out.print(Text(text, style="dim"), end=""), lambda: context.out.width)

    def write_reasoning(text: str) -> None:
        if sys.stdout.isatty():
            thoughts.feed(text)

    with context.connect(address) as client:
        info = client.info(model)
        if not model and len(info.models) > 1 and session and (found := find_session(client, session)):
            model = found.model
            info = client.info(model)
        conversation = Conversation(
            context,
            client,
            session,
            model=model,
            system=system,
            offered=offered,
            settings=_settings(info, max_tokens, temperature),
            timeout=timeout,
            write=write,
            view=AnswerView(write, write_reasoning),
            show_latency=show_latency,
        )
        if sys.stdin.isatty():
            shown, session_id = one_line(info.model), conversation.session_id
            context.note(f"{shown}, session {session_id}. /help lists what else there is, /exit leaves.")
            history = context.environment.home / "chat_history"
            lines = LineInput(history, marks_paste=not context.out.is_dumb_terminal)
            try:
                _talk(context, conversation, lines)
            except KeyboardInterrupt:
                write_text("\n")  # the terminal's next line begins at its start
                raise
            finally:
                lines.save()
                if conversation.turns:
                    context.note(f"continue with: scalellm chat --session {conversation.session_id}")
        else:
            for number, line in enumerate(sys.stdin, start=1):
                if line.strip():
                    require_utf8(line, f"line {number} of standard input")
                    if (call := conversation.next_call) is not None:
                        what = f"line {number}: the model waits for the result of {_name(call)}"
                        raise CliError(f"{what}, which can be given on a terminal only", ExitCode.FAILED)
                    conversation.turn(line.removesuffix("\n"))


def _settings(info: GetInfoResponse, max_tokens: int, temperature: float | None) -> dict[str, float]:
    settings: dict[str, float] = {"max_tokens": max_tokens}
    if temperature is not None:
        settings["temperature"] = temperature
    elif not info.sampling_defaults.HasField("temperature"):
        settings["temperature"] = _DEFAULT_TEMPERATURE
    return settings


def _talk(context: CliContext, conversation: Conversation, lines: LineInput) -> None:
    """Read turns from the terminal until /exit or Ctrl-D."""
    while True:
        try:
            call = conversation.next_call
            text = lines.read("> " if call is None else f"result of {_name(call)}> ")
        except EOFError:
            write_text("\n")
            break
        if text in ("/exit", "/quit"):
            break
        try:
            require_utf8(text, "line")
            if text.startswith("/") and "\n" not in text:
                _command(context, conversation, text)
            elif text and call is not None:
                conversation.give_result(text)
            elif text:
                conversation.turn(text)
        except CliError as error:
            context.error(str(error))
        except KeyboardInterrupt:
            context.note("(stopped; what was said is kept)")
        except ClientError as error:
            if error.unreachable:
                raise
            context.error(explain(error)[0])


def _command(context: CliContext, conversation: Conversation, line: str) -> None:
    """Do what a line that begins with a slash says. Raises as a turn does."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            context.out.print(Text(COMMANDS))
        case "/history":
            session = conversation.read()
            if session is None:
                context.note("nothing was said yet")
            else:
                print_messages(context, session)
        case "/new":
            _begin(context, conversation)
        case "/retry":
            conversation.retry()
        case "/system" if not rest:
            context.note(conversation.system or "no instructions")
        case "/system":
            conversation.system = rest
            _begin(context, conversation)
        case "/set" if not rest:
            settings = conversation.settings()
            context.note(", ".join(f"{key} {value:g}" for key, value in settings.items()) or "as the server does")
        case "/set":
            setting, _, value = rest.partition(" ")
            conversation.set(setting, value.strip())
        case "/skip":
            conversation.skip_calls()
        case "/latency":
            conversation.show_latency = not conversation.show_latency
            context.note(f"latency breakdown {'on' if conversation.show_latency else 'off'}")
        case _:
            context.error(f"unknown command {name}; /help lists those there are")


def _name(call: ToolCall) -> str:
    return one_line(f"{call.name} ({call.id})")


def _begin(context: CliContext, conversation: Conversation) -> None:
    conversation.begin()
    context.note(f"a new conversation, session {conversation.session_id}")
