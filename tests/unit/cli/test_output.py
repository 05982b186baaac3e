"""Output that the command line lets through to a terminal, a pipe and a JSON document."""

import io
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from hostile_text import HOSTILE, harmful_in, is_harmful
from scalellm.cli.output import Terminal, one_line, printable, write_json, write_text

ANY_TEXT = st.text(st.characters(codec=None, categories=None))


def test_what_unicode_calls_harmful_is_removed_and_no_more_than_a_few_invisible_marks() -> None:
    everything = list(map(chr, range(sys.maxunicode + 1)))
    removed = {character for character in everything if not printable(character)}
    assert {character for character in everything if is_harmful(character)} <= removed
    others = {character for character in removed if not is_harmful(character)}
    assert others == set("\u2060\u2061\u2062\u2063\u2064\u2065\u206a\u206b\u206c\u206d\u206e\u206f\ufff9\ufffa\ufffb")


@given(ANY_TEXT, ANY_TEXT)
def test_cleaning_goes_by_character(left: str, right: str) -> None:
    assert harmful_in(printable(left)) == []
    assert printable(printable(left)) == printable(left)
    assert printable(left) + printable(right) == printable(left + right), "an answer comes in pieces"


def test_scripts_are_left_as_they_are() -> None:
    for text in ("naïve\tcafé\n", "שלום عربي", "क्‍ष می‌خواهم", "👩‍👩‍👧 🏳️‍🌈", "한국어 日本語", "soft\xadhyphen"):
        assert printable(text) == text


@given(ANY_TEXT)
def test_a_name_is_on_one_line(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1
    assert harmful_in(one_line(text)) == []


@given(st.recursive(ANY_TEXT, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner), max_leaves=5))
def test_json_is_printable_and_exact(document: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream := io.StringIO())
        write_json(document)
    (line,) = stream.getvalue().split("\n")[:-1]
    assert harmful_in(line) == []
    assert json.loads(line) == document


def test_other_scripts_stay_readable_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"text": "é 日本 \x9b"})
    assert capsys.readouterr().out == '{"text": "é 日本 \\u009b"}\n'


def test_an_answer_is_exact_in_a_pipe_and_harmless_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(HOSTILE)
    assert capsys.readouterr().out == HOSTILE
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write_text(HOSTILE)
    assert capsys.readouterr().out == printable(HOSTILE)


def test_a_console_prints_nothing_harmful_and_takes_no_markup() -> None:
    console = Terminal(file=(stream := io.StringIO()), width=200)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    for renderable in (HOSTILE, Text(HOSTILE), table):
        console.print(renderable, soft_wrap=True)
    shown = stream.getvalue()
    assert harmful_in(shown) == []
    assert len(re.findall(r"\[red\]A31mBCDEF", shown)) == 6
    assert ":smile:" in shown
