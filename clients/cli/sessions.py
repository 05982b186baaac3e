"""`scalellm sessions`: the conversations that the server keeps."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from rich.table import Table
from rich.text import Text

from scalellm.cli.answer_view import calls_of
from scalellm.cli.context import CliContext
from scalellm.cli.output import one_line, write_json
from scalellm.v1.sessions_pb2 import Session

app = typer.Typer(help="Conversations that the server keeps: list, show, delete.", no_args_is_help=True)

_AddressOption = Annotated[str, typer.Option(metavar="HOST:PORT", help="Server to call.", show_default=False)]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_SessionArgument = Annotated[str, typer.Argument(metavar="ID", help="From `sessions list`.")]


def register(root: typer.Typer) -> None:
    """Add the commands to the application."""
    root.add_typer(app, name="sessions")


@app.command("list", help="List the conversations, those that end first first.")
def list_sessions(ctx: typer.Context, as_json: _JsonOption = False, address: _AddressOption = "") -> None:
    """List the sessions without their messages."""
    context = CliContext.of(ctx)
    with context.connect(address) as client:
        sessions = list(client.list_sessions())
    if as_json:
        write_json([_document(session) for session in sessions])
        return
    if not sessions:
        context.note("there are no sessions; scalellm chat begins one")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("id", "turns", "tokens", "last turn", "ends"):
        table.add_column(column, overflow="fold", justify="right" if column in ("turns", "tokens") else "left")
    for session in sessions:
        times = (_local(session.update_time), _local(session.expire_time))
        table.add_row(one_line(session.session_id), str(session.num_turns), str(session.num_tokens), *times)
    context.table(table)


@app.command("show", help="Print a conversation.")
def show(
    ctx: typer.Context, session_id: _SessionArgument, as_json: _JsonOption = False, address: _AddressOption = ""
) -> None:
    """All of its messages."""
    context = CliContext.of(ctx)
    with context.connect(address) as client:
        session = client.get_session(session_id)
    if as_json:
        messages = [
            {"role": message.role, "content": "", **MessageToDict(message, preserving_proto_field_name=True)}
            for message in session.messages
        ]
        write_json({**_document(session), "messages": messages})
        return
    print_messages(context, session)


@app.command("delete", help="Delete conversations; a turn that is running is not stored.")
def delete(
    ctx: typer.Context,
    session_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="From `sessions list`.")],
    address: _AddressOption = "",
) -> None:
    """Delete sessions for good."""
    context = CliContext.of(ctx)
    with context.connect(address) as client:
        for session_id in session_ids:
            client.delete_session(session_id)
            context.note(f"{session_id}: deleted")


def print_messages(context: CliContext, session: Session) -> None:
    """Print the messages of a session, each after its role."""
    for message in session.messages:
        reasoning = f"{message.reasoning}\n" if message.reasoning else ""
        said = message.content + calls_of(message.tool_calls)
        text = Text.assemble((f"{one_line(message.role)}: ", "bold"), (reasoning, "dim"), said)
        context.out.print(text, soft_wrap=True)


def _document(session: Session) -> dict[str, Any]:
    return {
        "session_id": session.session_id,
        "num_turns": session.num_turns,
        "num_tokens": session.num_tokens,
        "create_time": session.create_time.ToJsonString(),
        "update_time": session.update_time.ToJsonString(),
        "expire_time": session.expire_time.ToJsonString(),
    }


def _local(time: Timestamp) -> str:
    return datetime.fromtimestamp(time.seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
