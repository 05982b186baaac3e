"""Detokeniser and stop matcher together: text, stop string and token count do not depend on batching."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.stop_strings import StopStrings
from scalellm.services.tokenizer.text.text_stream import TextStream

Outcome = tuple[str, int, str | None]


def run(
    texts: TokenTexts, ids: list[int], stops: list[str], include_stop: bool, sizes: list[int], **options: Any
) -> Outcome:
    stream = TextStream(texts, StopStrings(stops), include_stop=include_stop, **options)
    shown, num_tokens, position = "", 0, 0
    for size in [*sizes, len(ids)]:
        delta = stream.push(ids[position : position + size])
        position += size
        shown += delta.text
        num_tokens += delta.num_tokens
        if delta.stop is not None:
            return shown, num_tokens, delta.stop
    rest = stream.flush()
    return shown + rest.text, num_tokens, rest.stop


@settings(max_examples=200)
@given(
    text=st.text(st.sampled_from("ab \n😀é"), max_size=20),
    stops=st.lists(st.text(st.sampled_from("ab \n😀\ufffd"), min_size=1, max_size=3), max_size=3),
    include_stop=st.booleans(),
    sizes=st.lists(st.integers(0, 4), max_size=20),
    cut=st.integers(0, 2),
    name=st.sampled_from(["smollm2", "gemma3", "byte_fallback"]),
)
def test_batching_does_not_matter(
    text: str,
    stops: list[str],
    include_stop: bool,
    sizes: list[int],
    cut: int,
    name: str,
    tokenizers: dict[str, Tokenizer],
    token_texts: dict[str, TokenTexts],
) -> None:
    ids = tokenizers[name].encode(text, add_special_tokens=False).ids
    ids = ids[: len(ids) - cut]
    texts = token_texts[name]
    expected = run(texts, ids, stops, include_stop, [1] * len(ids))
    assert run(texts, ids, stops, include_stop, sizes) == expected
    if expected[2] is None:
        assert expected == (tokenizers[name].decode(ids), len(ids), None)


def test_the_token_that_completes_the_stop_string_is_the_last(
    tokenizers: dict[str, Tokenizer], token_texts: dict[str, TokenTexts]
) -> None:
    tokenizer = tokenizers["smollm2"]
    ids = tokenizer.encode("Sure. Here it is.\nUser: and more").ids
    shown, num_tokens, stop = run(token_texts["smollm2"], ids, ["\nUser:"], False, [len(ids)])
    assert (shown, stop) == ("Sure. Here it is.", "\nUser:")
    assert "\nUser:" in tokenizer.decode(ids[:num_tokens])
    assert "\nUser:" not in tokenizer.decode(ids[: num_tokens - 1])


def end_of_first_match(text: str, start: int, stops: list[str]) -> tuple[int, str] | None:
    """End of the first stop string that ends behind `start`; of several the longest."""
    for end in range(start + 1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(found, key=len)
    return None


def by_definition(
    texts: TokenTexts, ids: list[int], stops: list[str], include_stop: bool, min_tokens: int, skip: bool
) -> Outcome:
    """The rules, said once more without any state: every token looks at all of the text."""

    def outcome(text: str, num_tokens: int, match: tuple[int, str]) -> Outcome:
        end, stop = match
        return text[: end if include_stop else end - len(stop)], num_tokens, stop

    detokenizer, text = texts.detokenizer(skip_special_tokens=skip), ""
    for count, token_id in enumerate(ids, start=1):
        stop = next((stop for stop in stops if skip and texts.special_ids.get(stop) == token_id), None)
        if stop is not None and count > min_tokens:
            whole = text + detokenizer.copy().flush()
            if match := end_of_first_match(whole, len(text), stops):
                return outcome(whole, count - 1, match)
            return whole + stop * include_stop, count, stop
        start, text = len(text), text + detokenizer.push([token_id])
        if count > min_tokens and (match := end_of_first_match(text, start, stops)):
            return outcome(text, count, match)
    whole = text + detokenizer.flush()
    if len(ids) >= min_tokens and (match := end_of_first_match(whole, len(text), stops)):
        return outcome(whole, len(ids), match)
    return whole, len(ids), None


@settings(max_examples=400)
@given(
    pieces=st.lists(st.sampled_from(["a", "b", "ab", " ", "😀", "é", "<|im_end|>", "<|im_start|>"]), max_size=12),
    stops=st.lists(
        st.one_of(st.text(st.sampled_from("ab \ufffd"), min_size=1, max_size=3), st.just("<|im_end|>")), max_size=3
    ),
    include_stop=st.booleans(),
    sizes=st.lists(st.integers(0, 4), max_size=20),
    min_tokens=st.integers(0, 8),
    skip=st.booleans(),
    cut=st.integers(0, 1),
)
def test_stop_strings_by_definition(
    pieces: list[str],
    stops: list[str],
    include_stop: bool,
    sizes: list[int],
    min_tokens: int,
    skip: bool,
    cut: int,
    tokenizers: dict[str, Tokenizer],
    token_texts: dict[str, TokenTexts],
) -> None:
    texts = token_texts["smollm2"]
    ids = tokenizers["smollm2"].encode("".join(pieces), add_special_tokens=False).ids
    ids = ids[: len(ids) - cut]
    expected = by_definition(texts, ids, stops, include_stop, min_tokens, skip)
    options = {"min_tokens": min_tokens, "skip_special_tokens": skip}
    assert run(texts, ids, stops, include_stop, sizes, **options) == expected
    assert run(texts, ids, stops, include_stop, [1] * len(ids), **options) == expected


def test_a_stop_string_may_begin_among_the_first_tokens(
    tokenizers: dict[str, Tokenizer], token_texts: dict[str, TokenTexts]
) -> None:
    # As vLLM has it: a stop string counts from where it is complete.
    ids = tokenizers["smollm2"].encode("one\n\ntwo\n\nthree", add_special_tokens=False).ids
    shown, _, stop = run(token_texts["smollm2"], ids, ["\n\n"], False, [], min_tokens=3)
    assert (shown, stop) == ("one\n\ntwo", "\n\n")
    assert run(token_texts["smollm2"], ids, ["\n\ntw"], False, [], min_tokens=2)[0] == "one"
    assert run(token_texts["smollm2"], ids, ["\n\n"], False, [], min_tokens=len(ids))[2] is None


def test_special_tokens_are_shown_on_request(smollm2: object, token_texts: dict[str, TokenTexts]) -> None:
    assert TextStream(token_texts["smollm2"]).push([1, 2]).text == ""
    assert TextStream(token_texts["smollm2"], skip_special_tokens=False).push([1, 2]).text == "<|im_start|><|im_end|>"
