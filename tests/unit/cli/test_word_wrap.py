"""Lines are broken between words, whatever the pieces in which the text comes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from scalellm.cli.word_wrap import WordWrap


def wrapped(pieces: list[str], width: int) -> str:
    written: list[str] = []
    wrap = WordWrap(written.append, lambda: width)
    for piece in pieces:
        wrap.feed(piece)
    wrap.flush()
    return "".join(written)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", "one two\nthree"),
        ("one twothree", "one\ntwothree"),
        ("a  b\n\n  c", "a  b\n\n  c"),
        ("one two \nthree", "one two\nthree"),
        ("incomprehensibilities are", "incomprehensibilities\nare"),
        ("一二三四五六", "一二三四\n五六"),
    ],
)
def test_lines(text: str, expected: str) -> None:
    assert wrapped([text], 9) == expected
    assert wrapped(list(text), 9) == expected


@given(st.lists(st.text(alphabet="ab \n-中"), max_size=12), st.integers(4, 30))
def test_nothing_but_breaks_and_spaces_at_them_is_changed(pieces: list[str], width: int) -> None:
    text = "".join(pieces)
    shown = wrapped(pieces, width)
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    for line in shown.split("\n"):
        words = line.split()
        assert cell_len(line.rstrip()) <= width or len(words) == 1 or line[0] == " "


def test_a_word_is_held_back_until_it_ends() -> None:
    written: list[str] = []
    wrap = WordWrap(written.append, lambda: 80)
    wrap.feed("Hel")
    assert written == []
    wrap.feed("lo wor")
    assert written == ["Hello"]
    wrap.feed("\n")
    assert "".join(written) == "Hello wor\n"
