"""Masks that take long are the same, computed by their thread as within a step."""

from __future__ import annotations

import time

import numpy as np
import pytest

from scalellm.services.common.vocabulary import Vocabulary
from scalellm.services.executor.grammar import LlGrammarCompiler, Masks


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
