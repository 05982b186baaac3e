"""The shape of an answer, as options ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalellm.cli.context import CliError, ExitCode
from scalellm.v1.generation_pb2 import Choice, StructuredOutput


def read_shape(json_schema: Path | None, regex: str | None, choices: Sequence[str]) -> StructuredOutput | None:
    """Return the shape that one of the options says, None without them. Raises CliError."""
    given = [
        name
        for name, value in (("--json-schema", json_schema), ("--regex", regex), ("--choice", choices or None))
        if value is not None
    ]
    if len(given) > 1:
        raise CliError(f"{' and '.join(given)} exclude each other: an answer has one shape", ExitCode.USAGE)
    if json_schema is not None:
        try:
            return StructuredOutput(json_schema=json_schema.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise CliError(f"--json-schema: {json_schema} cannot be read: {reason}", ExitCode.USAGE) from None
    if regex is not None:
        return StructuredOutput(regex=regex)
    return StructuredOutput(choice=Choice(texts=choices)) if choices else None
