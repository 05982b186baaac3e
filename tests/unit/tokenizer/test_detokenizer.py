"""The sum of all deltas is what decoding at once gives: for any tokens, any batching, any decoder."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from scalellm.services.tokenizer.text.detokenizer import TokenTexts, _PieceDetokenizer
from scalellm.services.tokenizer.text.model_tokenizer import UnsupportedTokenizerError

NAMES = ["smollm2", "gemma3", "byte_level", "byte_fallback", "unigram"]
FIXTURES_ARE_CONSTANT = settings(max_examples=75)
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [
                "😀",
                "👩‍👩‍👧‍👦",
                "🇩🇪",
                "e\u0301\u0323",
                "数据",
                "שלום",
                "مرحبا",
                "\u200f",
                "\ufffd",
                "  ",
                "\n\n",
                "\r\n",
                "▁",
                "<0xE2>",
            ]
        ),
    ),
    max_size=8,
).map("".join)


def in_batches(texts: TokenTexts, ids: list[int], sizes: list[int], skip: bool) -> str:
    detokenizer = texts.detokenizer(skip_special_tokens=skip)
    pieces, position = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(detokenizer.push(ids[position : position + size]))
        position += size
        detokenizer.copy().push(ids)  # a copy leaves the original alone
    return "".join(pieces) + detokenizer.flush()


SIZES = st.lists(st.integers(0, 4), max_size=30)


@pytest.mark.parametrize("name", NAMES)
@FIXTURES_ARE_CONSTANT
@given(data=st.data(), sizes=SIZES, skip=st.booleans())
def test_any_tokens(
    name: str,
    tokenizers: dict[str, Tokenizer],
    token_texts: dict[str, TokenTexts],
    data: Any,
    sizes: list[int],
    skip: bool,
) -> None:
    tokenizer = tokenizers[name]
    # Low ids hold the bytes and special tokens in all of these, so draw from there as often as from everywhere.
    token = st.one_of(st.integers(0, 500), st.integers(0, tokenizer.get_vocab_size() - 1))
    ids = data.draw(st.lists(token, max_size=30))
    assert in_batches(token_texts[name], ids, sizes, skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", NAMES)
@FIXTURES_ARE_CONSTANT
@given(text=TEXTS, sizes=SIZES, cut=st.integers(0, 3))
def test_any_text(
    name: str,
    tokenizers: dict[str, Tokenizer],
    token_texts: dict[str, TokenTexts],
    text: str,
    sizes: list[int],
    cut: int,
) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    ids = ids[: len(ids) - cut]
    got = in_batches(token_texts[name], ids, sizes, False)
    assert got == tokenizer.decode(ids, skip_special_tokens=False)
    if name == "byte_level" and not cut:
        assert got == text  # this vocabulary has every byte; SmolLM2's lacks some, so it cannot spell every text


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "byte_fallback"])
@FIXTURES_ARE_CONSTANT
@given(data=st.binary(max_size=24), sizes=SIZES)
def test_any_bytes(
    name: str, tokenizers: dict[str, Tokenizer], token_texts: dict[str, TokenTexts], data: bytes, sizes: list[int]
) -> None:
    tokenizer = tokenizers[name]
    if name == "smollm2":
        spelling = {chr(b): b for b in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
        missing = [b for b in range(256) if b not in spelling.values()]
        by_byte = {b: c for c, b in (spelling | {chr(0x100 + i): b for i, b in enumerate(missing)}).items()}
        ids = [tokenizer.token_to_id(by_byte[b]) for b in data]
        ids = [token_id for token_id in ids if token_id is not None]  # UTF-8 never uses all bytes: some have no token
    else:
        ids = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in data]
    assert in_batches(token_texts[name], ids, sizes, True) == tokenizer.decode(ids)


def pieces_of(name: str, tokenizer: Tokenizer, draw: Callable[[st.SearchStrategy], Any]) -> list[int]:
    """Tokens of a text, any tokens, and bytes of characters that need not be complete."""
    parts = st.one_of(
        TEXTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False).ids),
        st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=4),
        st.lists(st.sampled_from(byte_tokens(name, tokenizer)), max_size=3),
    )
    return [token_id for part in draw(st.lists(parts, max_size=3)) for token_id in part]


def byte_tokens(name: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens that are one byte of a character, or what comes nearest."""
    spellings = [f"<0x{byte:02X}>" for byte in (0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x41)] + list("âĤ¬ðŁA▁")
    known = [tokenizer.token_to_id(spelling) for spelling in spellings]
    return [token_id for token_id in known if token_id is not None]


@pytest.mark.parametrize("name", NAMES)
@FIXTURES_ARE_CONSTANT
@given(data=st.data(), sizes=SIZES, skip=st.booleans())
def test_an_answer_goes_on_where_its_prompt_ends(
    name: str,
    tokenizers: dict[str, Tokenizer],
    token_texts: dict[str, TokenTexts],
    data: st.DataObject,
    sizes: list[int],
    skip: bool,
) -> None:
    tokenizer = tokenizers[name]
    prompt, answer = pieces_of(name, tokenizer, data.draw), pieces_of(name, tokenizer, data.draw)
    shown = in_batches(token_texts[name].after(prompt), answer, sizes, skip)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + answer, skip_special_tokens=skip)
    if shown != whole[len(before) :]:  # the answer completed a character, and shows all of it
        assert not whole.startswith(before)
        assert whole.endswith(shown)
        assert before.startswith(whole.removesuffix(shown))
        assert set(before[len(whole) - len(shown) :]) == {"\ufffd"}


@pytest.mark.parametrize("name", ["byte_fallback", "unigram"])
def test_the_space_before_an_answers_first_word_is_kept(
    name: str, tokenizers: dict[str, Tokenizer], token_texts: dict[str, TokenTexts]
) -> None:
    prompt, whole = (tokenizers[name].encode(text, add_special_tokens=False).ids for text in ("The", "The committee"))
    assert in_batches(token_texts[name], whole[len(prompt) :], [], True) == "committee"
    assert in_batches(token_texts[name].after(prompt), whole[len(prompt) :], [], True) == " committee"


class Counted(list[int]):
    """Tokens that count how often one of them is read."""

    num_reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_reads += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(len(self)))

    def __reversed__(self) -> Iterator[int]:
        return (self[index] for index in reversed(range(len(self))))


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_long_prompt_costs_no_more_than_a_short_one(
    name: str, tokenizers: dict[str, Tokenizer], token_texts: dict[str, TokenTexts]
) -> None:
    ids = tokenizers[name].encode("the committee met", add_special_tokens=False).ids
    reads = []
    for repeats in (10, 1000):
        prompt = Counted(ids * repeats)
        token_texts[name].after(prompt).detokenizer()
        reads.append(prompt.num_reads)
    assert reads[0] == reads[1] > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("byte_level", "special"), ("byte_fallback", "special"), ("byte_fallback", "byte"), ("unigram", "special")],
)
def test_a_prompt_that_shows_nothing_is_read_once_for_all_samples(
    name: str,
    kind: str,
    tokenizers: dict[str, Tokenizer],
    token_texts: dict[str, TokenTexts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts, num_pushes = token_texts[name], 0
    ids = list(texts.special_ids.values()) if kind == "special" else byte_tokens(name, tokenizers[name])[:2]
    assert ids
    push = _PieceDetokenizer.push

    def counting(self: _PieceDetokenizer, token_ids: Sequence[int]) -> str:
        nonlocal num_pushes
        num_pushes += 1
        return push(self, token_ids)

    monkeypatch.setattr(_PieceDetokenizer, "push", counting)
    prompt = Counted(ids * 1000)
    texts = texts.after(prompt)
    samples = [texts.detokenizer() for _ in range(16)]
    assert prompt.num_reads <= 2 * len(prompt)
    assert num_pushes <= 1
    answer = tokenizers[name].encode("the committee met", add_special_tokens=False).ids
    assert len({sample.push(answer) + sample.flush() for sample in samples}) == 1


def test_characters_are_shown_once_they_are_complete(
    tokenizers: dict[str, Tokenizer], token_texts: dict[str, TokenTexts]
) -> None:
    ids = tokenizers["byte_level"].encode("é€𝄞").ids
    detokenizer = token_texts["byte_level"].detokenizer()
    deltas = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(deltas) == "é€𝄞"
    assert "\ufffd" not in "".join(deltas)
    assert detokenizer.flush() == ""


def test_ids_beyond_the_vocabulary_have_no_text(
    tokenizers: dict[str, Tokenizer], token_texts: dict[str, TokenTexts]
) -> None:
    for name in ("smollm2", "gemma3"):
        ids = [100, 10_000_000, 101]
        assert token_texts[name].detokenizer().push(ids) == tokenizers[name].decode(ids)


def test_other_decoders_are_refused() -> None:
    tokenizer = Tokenizer.from_str(
        '{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}'
    )
    for decoder in (None, decoders.WordPiece(), decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])):
        if decoder is not None:
            tokenizer.decoder = decoder
        with pytest.raises(UnsupportedTokenizerError, match="decoder"):
            TokenTexts(tokenizer)
