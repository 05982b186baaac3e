"""Stop strings against a search that looks at every end of the whole text."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scalellm.services.tokenizer.text.stop_strings import StopMatcher, StopStrings

LETTERS = st.sampled_from("ab]^-\\\n😀")


def search(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include_stop else text[: end - len(stop)]), stop
    return text, None


def stream(text: str, stops: list[str], include_stop: bool, sizes: list[int]) -> tuple[str, str | None]:
    matcher = StopMatcher(StopStrings(stops), include_stop=include_stop)
    shown, position = "", 0
    for size in [*sizes, len(text)]:
        chunk = text[position : position + size]
        position += len(chunk)
        result = matcher.push(chunk)
        shown += result.text
        if result.stop is not None:
            assert text[: position - len(chunk) + result.num_chars_read].endswith(result.stop)
            return shown, result.stop
        assert result.num_chars_read == len(chunk)
        if not include_stop:
            # Exactly what could still become a stop string is held back.
            known = text[:position]
            begun = max((n for stop in stops for n in range(len(stop)) if known.endswith(stop[:n])), default=0)
            assert shown == known[: len(known) - begun]
    return shown + matcher.flush(), None


@settings(max_examples=600)
@given(
    text=st.text(LETTERS, max_size=20),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4),
    include_stop=st.booleans(),
    sizes=st.lists(st.integers(0, 4), max_size=12),
)
@example("aabaab", ["abaab", "ba"], False, [1, 1, 1, 1, 1, 1])
@example("abcd", ["abcde", "bcd", "d"], False, [2, 1])
def test_equals_search_on_the_whole_text(text: str, stops: list[str], include_stop: bool, sizes: list[int]) -> None:
    assert stream(text, stops, include_stop, sizes) == search(text, stops, include_stop)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["x", ""])
