"""`scalellm tokenize`."""

from __future__ import annotations

from typing import Annotated

import typer

from scalellm.cli.context import CliContext, CliError, ExitCode, ModelOption
from scalellm.cli.output import write_json, write_text
from scalellm.cli.text import read_text
from scalellm.v1.generation_pb2 import Chat, ChatMessage

HELP = """Show the tokens of a text, or the text of tokens.

Prints one token per line: its id and how the vocabulary writes it.

\b
Examples:
  scalellm tokenize "Hello, world"
  scalellm tokenize --ids "Hello, world"
  scalellm tokenize --decode "19556 28 905"
  scalellm tokenize --chat "Hello" --json
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("tokenize", help=HELP)(tokenize)


def tokenize(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(help="The text; - or nothing: standard input.")] = None,
    *,
    model: ModelOption = "",
    decode: Annotated[bool, typer.Option("--decode", help="TEXT is token ids; print their text.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="TEXT is a user's message; apply the chat template.")] = False,
    no_special: Annotated[bool, typer.Option("--no-special", help="Without special tokens.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Print only the ids, on one line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Server to call.", show_default=False)] = "",
) -> None:
    """Encode or decode."""
    if decode and chat:
        raise CliError("--decode and --chat exclude each other", ExitCode.USAGE)
    given = read_text(text, "text")
    with CliContext.of(ctx).connect(address) as client:
        if decode:
            token_ids = _parse_ids(given)
            result = client.decode(token_ids, skip_special_tokens=no_special, model=model)
            if as_json:
                write_json({"text": result})
            else:
                write_text(f"{result}\n")
            return
        if chat:
            message = ChatMessage(role="user", content=given)
            given = client.apply_chat_template(Chat(messages=[message]), model=model).text
        # A template writes the special tokens itself.
        response = client.encode(given, add_special_tokens=not (no_special or chat), model=model)
    token_ids, tokens = list(response.token_ids), list(response.tokens)
    if as_json:
        write_json({"token_ids": token_ids, "tokens": tokens})
    elif ids:
        write_text(f"{' '.join(map(str, token_ids))}\n")
    else:
        for id_, token in zip(token_ids, tokens, strict=True):
            write_text(f"{id_}\t{token!r}\n")


def _parse_ids(text: str) -> list[int]:
    try:
        token_ids = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise CliError("--decode: token ids are numbers, separated by spaces or commas", ExitCode.USAGE) from None
    if any(not 0 <= id_ < 2**32 for id_ in token_ids):
        raise CliError("--decode: token ids are between 0 and 2^32 - 1", ExitCode.USAGE)
    return token_ids
