"""Detokeniser and stop matcher together: text, stop string and token count do not depend on batching."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.tokenizer.text.detokenizer import TokenTexts
from services.tokenizer.text.stop_strings import StopStrings
from services.tokenizer.text.text_stream import TextStream

Outcome = tuple[str, int, str | None]


def run(texts: TokenTexts, ids: list[int], stops: list[str], include_stop: bool, sizes: list[int]) -> Outcome:
    stream = TextStream(texts, StopStrings(stops), include_stop=include_stop)
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


def test_special_tokens_are_shown_on_request(smollm2: object, token_texts: dict[str, TokenTexts]) -> None:
    assert TextStream(token_texts["smollm2"]).push([1, 2]).text == ""
    assert TextStream(token_texts["smollm2"], skip_special_tokens=False).push([1, 2]).text == "<|im_start|><|im_end|>"
