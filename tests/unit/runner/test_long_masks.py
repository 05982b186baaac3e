"""Masks that may take long are computed by a thread of their own, until those of their grammar have proved quick."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from grammar_kit import VOCABULARY, ids_of, make_compiler
from scalellm.services.common.vocabulary import Vocabulary
from scalellm.services.executor.grammar import LlGrammarCompiler, Masks
from scalellm.services.executor.grammar.matcher import LlMatcher

GRAMMAR = "start: /[A-Z]*/"


@pytest.fixture
def compiler() -> Iterator[LlGrammarCompiler]:
    compiler = make_compiler()
    yield compiler
    compiler.close()


def matcher_of(compiler: LlGrammarCompiler, grammar: str = GRAMMAR) -> LlMatcher:
    (matcher,) = compiler.start(grammar, [[]]).matchers()
    return matcher


def take_masks(matcher: LlMatcher, count: int) -> None:
    """Let the thread compute the masks behind one more letter each, from the first token on."""
    for length in range(count):
        token_ids = ids_of("A" * length)
        while not matcher.has_mask(token_ids):
            time.sleep(1e-3)
        assert matcher.take_mask(token_ids) is not None


@pytest.mark.parametrize("size", [31, 32, 33, 64])
def test_the_thread_computes_the_mask_of_a_step(size: int) -> None:
    vocabulary = Vocabulary([b"<end>", *(bytes([0x40 + place]) for place in range(1, size))], frozenset({0}))
    compiler = LlGrammarCompiler(vocabulary, {0})
    within, before = compiler.start("start: /[A-T]{2}[B-D]?/", [[], []]).matchers()
    masks = Masks(1, size)
    told = [7]  # a prompt of one token
    for token_id in (1, 2, 3):
        within.follow(told, 1)
        within.matcher.unsafe_compute_mask_ptr(masks.rows.ctypes.data, masks.rows.nbytes)
        assert before.take_mask(told) is None
        while not before.has_mask(told, 1):
            time.sleep(1e-3)
        assert np.array_equal(before.take_mask(told), masks.rows[0])
        told.append(token_id)
    compiler.close()


def test_rows_of_drafts_are_masked_although_the_first_mask_was_computed_before_the_step(compiler) -> None:
    matcher = matcher_of(compiler, "start: /A[B-C]/")
    while not matcher.has_mask([]):
        time.sleep(1e-3)
    group = SimpleNamespace(num_prompt_tokens=0, banned_at=lambda num_output_tokens: ())
    seq = SimpleNamespace(matcher=matcher, token_ids=[], group=group)
    (draft,) = ids_of("A")
    rows = [SimpleNamespace(seq=seq, draft=token, num_output_tokens=0) for token in (None, draft)]
    masks = Masks(2, len(VOCABULARY.tokens))
    assert not masks.fill(rows)
    assert [{masks.pick(place, number) for number in range(9)} for place in (0, 1)] == [{draft}, {*ids_of("BC")}]


def test_a_mask_that_is_cancelled_before_its_turn_takes_no_time_of_the_thread(compiler, monkeypatch) -> None:
    made, make, may_go_on = [], LlMatcher._make, threading.Event()

    def noted(matcher: LlMatcher, *args: object) -> object:
        made.append(matcher)
        return make(matcher, *args)

    monkeypatch.setattr(LlMatcher, "_make", noted)
    ended, other = matcher_of(compiler), matcher_of(compiler)
    ended.cancel()  # nothing was asked for yet
    compiler._mask_thread.submit(may_go_on.wait)
    assert not ended.has_mask([])
    assert not other.has_mask([])
    ended.cancel()
    may_go_on.set()
    take_masks(other, 1)
    assert made == [other]


def test_samples_of_a_grammar_come_into_the_steps_once_its_masks_are_quick(compiler) -> None:
    first = matcher_of(compiler)
    take_masks(first, 7)
    assert first.is_slow
    assert matcher_of(compiler).is_slow
    take_masks(first, 8)
    assert not first.is_slow
    assert not matcher_of(compiler).is_slow
    assert matcher_of(compiler, "start: /[A-Y]*/").is_slow


def test_a_long_mask_within_a_step_sends_its_sample_and_those_to_come_out_of_the_steps(compiler) -> None:
    first = matcher_of(compiler)
    take_masks(first, 8)
    beside = matcher_of(compiler)
    first.judge(seconds=0.02)
    assert (first.is_slow, beside.is_slow, matcher_of(compiler).is_slow) == (True, False, True)
    take_masks(first, 8)
    assert (first.is_slow, matcher_of(compiler).is_slow) == (False, False)


def test_a_long_mask_in_the_thread_counts_against_those_before_it(compiler, monkeypatch) -> None:
    matcher = matcher_of(compiler)
    take_masks(matcher, 7)
    with monkeypatch.context() as every_mask:
        every_mask.setattr("scalellm.services.executor.grammar.matcher._QUICK_S", 0.0)
        take_masks(matcher, 1)
    take_masks(matcher, 7)
    assert matcher.is_slow
    take_masks(matcher, 1)
    assert not matcher.is_slow
