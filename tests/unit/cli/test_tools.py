"""Functions that an answer may call, as options of the command line name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli.context import CliError, ExitCode
from scalellm.cli.tools import offer_tools
from scalellm.v1.generation_pb2 import TOOL_CHOICE_MODE_NONE, TOOL_CHOICE_MODE_REQUIRED, Chat

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
NESTED = {"type": "function", "function": {"name": "get", "description": "Gets.", "parameters": SCHEMA}}
FLAT = {"type": "function", "name": "now", "strict": False}


def written(tmp_path: Path, tools: Any) -> Path:
    file = tmp_path / "tools.json"
    file.write_text(tools if isinstance(tools, str) else json.dumps(tools))
    return file


def test_both_ways_of_openai_to_write_tools_are_read(tmp_path: Path) -> None:
    chat = Chat()
    offer_tools(chat, written(tmp_path, [NESTED, FLAT]), None)
    get, now = chat.tools
    assert (get.name, get.description, json.loads(get.parameters)) == ("get", "Gets.", SCHEMA)
    assert (now.name, now.parameters, now.HasField("strict"), now.strict) == ("now", "", True, False)
    assert not chat.HasField("tool_choice")


def test_what_the_model_is_to_do(tmp_path: Path) -> None:
    file = written(tmp_path, [NESTED, FLAT])
    for choice, mode, names in (
        ("auto", 0, []),
        ("none", TOOL_CHOICE_MODE_NONE, []),
        ("required", TOOL_CHOICE_MODE_REQUIRED, []),
        ("now", TOOL_CHOICE_MODE_REQUIRED, ["now"]),
    ):
        chat = Chat()
        offer_tools(chat, file, choice)
        assert (chat.tool_choice.mode, list(chat.tool_choice.names)) == (mode, names)
        assert chat.tool_choice.single == bool(names)


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        ("{", None, "is not JSON"),
        ("[" * 100_000, None, "is not JSON"),
        ({}, None, "tools: must be a list of tools"),
        ([], None, "has no tools"),
        ([{"type": "web_search"}], None, r"tools\[0\].type: must be function"),
        ([NESTED, {"type": "function"}], None, r"tools\[1\].name: must be a string"),
        ([FLAT] * 129, None, "must have at most 128 entries, got 129"),
        ([FLAT], "noon", "'noon' is not auto, required, none or one of now"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, tools: Any, choice: str | None, says: str) -> None:
    with pytest.raises(CliError, match=says) as caught:
        offer_tools(Chat(), written(tmp_path, tools), choice)
    assert caught.value.code is ExitCode.USAGE


def test_a_choice_needs_tools(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="--tool-choice needs --tools"):
        offer_tools(Chat(), None, "auto")
    with pytest.raises(CliError, match="cannot be read: No such file"):
        offer_tools(Chat(), tmp_path / "none.json", None)
