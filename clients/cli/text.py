"""Text that the user gives: as an argument or on standard input."""

from __future__ import annotations

import sys

from scalellm.cli.context import CliError, ExitCode


def read_text(argument: str | None, what: str) -> str:
    """The argument; without one (or with "-") standard input, without its last line break."""
    if argument is not None and argument != "-":
        text = argument
    elif argument is None and sys.stdin.isatty():
        raise CliError(f"no {what}: give it as an argument or on standard input", ExitCode.USAGE)
    else:
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CliError(f"standard input is not UTF-8: byte {error.start}", ExitCode.USAGE) from None
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise CliError(f"the {what} is empty", ExitCode.USAGE)
    return text


def require_utf8(text: str, what: str) -> None:
    """Raise CliError for a text that was read from bytes that are not UTF-8: no request can carry it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CliError(f"{what} is not UTF-8", ExitCode.USAGE) from None
