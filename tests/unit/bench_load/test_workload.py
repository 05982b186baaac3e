"""Requests and their times follow from the seed, and match the options."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.vocabulary import Vocabulary
from bench.load.workload import Load, Shape, arrival_times, conversations, digest

ALPHABET = range(100, 1100)


def test_arrivals_follow_the_seed_and_the_rate():
    times = arrival_times(20.0, 4000, "7")
    assert times == arrival_times(20.0, 4000, "7")
    assert times != arrival_times(20.0, 4000, "8")
    gaps = np.diff([0.0, *times])
    assert (gaps > 0).all()
    # Of an exponential distribution, mean and deviation are both 1 / rate.
    assert gaps.mean() == pytest.approx(0.05, rel=0.05)
    assert gaps.std() == pytest.approx(0.05, rel=0.08)


@given(st.sampled_from(["fixed", "chat", "shared", "sessions", "json", "edits"]), st.integers(1, 60), st.integers(0, 5))
def test_conversations_are_what_was_asked_for(workload, num_requests, seed):
    shape = Shape(workload, input_len=9, output_len=7, max_len=40, prefix_len=5, turns=3)
    planned = conversations(shape, ALPHABET, num_requests, str(seed))
    turns = [turn for conversation in planned for turn in conversation.turns]
    per_conversation = 3 if workload == "sessions" else 1
    assert len(turns) == math.ceil(num_requests / per_conversation) * per_conversation
    assert all(set(turn.token_ids) <= set(ALPHABET) for turn in turns)
    if workload == "chat":
        assert all(turn.output_len >= 1 and len(turn.token_ids) >= 1 for turn in turns)
        assert all(len(turn.token_ids) + turn.output_len <= 40 for turn in turns)
    else:
        assert {len(turn.token_ids) for turn in turns} == {14 if workload == "shared" else 9}
        assert {turn.output_len for turn in turns} == {7}
    if workload == "shared":
        assert len({turn.token_ids[:5] for turn in turns}) == 1
    again = conversations(shape, ALPHABET, num_requests, str(seed))
    assert again == planned
    assert digest(again) == digest(planned) != digest(conversations(shape, ALPHABET, num_requests, "other"))


def test_chat_lengths_have_the_stated_medians_and_long_tails():
    shape = Shape("chat", input_len=100, output_len=60, max_len=100_000)
    turns = [conversation.turns[0] for conversation in conversations(shape, ALPHABET, 4000, "0")]
    prompts, answers = [len(turn.token_ids) for turn in turns], [turn.output_len for turn in turns]
    assert np.median(prompts) == pytest.approx(100, rel=0.1)
    assert np.median(answers) == pytest.approx(60, rel=0.1)
    assert np.percentile(prompts, 99) > 8 * np.median(prompts)


def test_cancellations_are_a_share_and_fall_within_the_answer():
    planned = conversations(Shape(cancel_share=0.25, output_len=10), ALPHABET, 2000, "0")
    cancelled = [turn.cancel_after for one in planned for turn in one.turns if turn.cancel_after is not None]
    assert len(cancelled) == pytest.approx(500, rel=0.15)
    assert set(cancelled) == set(range(1, 10))


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1.5", "0/s", "inf/s", "nan/s"])
def test_other_loads_are_refused(text):
    with pytest.raises(ValueError, match="is no load"):
        Load.parse(text)


def test_loads_read_as_they_are_written():
    assert [str(Load.parse(text)) for text in ("8", " 2.5/s")] == ["8", "2.5/s"]


def test_only_words_are_drawn(tokenizer_file):
    vocabulary = Vocabulary.of_words(tokenizer_file.parent)
    assert vocabulary.alphabet == tuple(range(100))
    assert vocabulary.text([0, 11, 99]) == "aa bb jj"


def test_text_of_words_is_the_same_tokens_again(model_dir):
    vocabulary = Vocabulary.of_words(model_dir("smollm2-135m-instruct"))
    for conversation in conversations(Shape("chat"), vocabulary.alphabet, 20, "0"):
        token_ids = conversation.turns[0].token_ids
        assert vocabulary.tokenizer.encode(vocabulary.text(token_ids), add_special_tokens=False).ids == list(token_ids)


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--tokenizer: .*tokenizer"):
        Vocabulary.of_words(tmp_path)


def test_an_edit_begins_the_same_text_again_with_some_tokens_changed() -> None:
    alphabet = range(1000, 9000)
    (turn,) = conversations(Shape("edits", input_len=200, output_len=40), alphabet, 1, "seed")[0].turns
    text, again = turn.token_ids[:150], turn.token_ids[150:]
    assert len(again) == 50
    changed = [place for place, (one, other) in enumerate(zip(text, again, strict=False)) if one != other]
    assert changed == [15, 31, 47]
