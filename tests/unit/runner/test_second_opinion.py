"""Masks of llguidance and of xgrammar over SmolLM2's vocabulary, step by step along random texts: the same bits.

xgrammar is no dependency. To run this: `.venv/bin/pip install --no-deps xgrammar==0.2.8 apache-tvm-ffi`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from scalellm.services.common.vocabulary import read_vocabulary
from scalellm.services.executor.grammar import LlGrammarCompiler
from scalellm.services.tokenizer.structure import grammar_of
from scalellm.v1 import generation_pb2

xgrammar = pytest.importorskip("xgrammar")

VOCAB_SIZE, EOS = 49152, 2
STEPS = 25
EXPRESSIONS = (
    *(r"(yes|no)+!", r"[a-f]{3,9}[0-9]*\.", "[0-9]{4}-[0-9]{2}-[0-9]{2}", "(a|b|ab)*c", "[^a]{1,20}"),
    *("([A-Za-z_]+ ){1,3}end", "ü{2,4}|語+", "[a-z ]{0,40}(red|green)?", "(yes|no|not at all)"),
)


def bits(words: bytes) -> npt.NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(words, np.uint8), count=VOCAB_SIZE, bitorder="little")


def test_masks_are_those_of_xgrammar(model_dir: Callable[[str], Path]) -> None:
    vocabulary = read_vocabulary(model_dir("smollm2-135m-instruct"), VOCAB_SIZE)
    compiler = LlGrammarCompiler(vocabulary, {EOS})
    texts = [b"" if number in vocabulary.special_ids else text for number, text in enumerate(vocabulary.tokens)]
    raw = xgrammar.VocabType.RAW
    others = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo(texts, vocab_type=raw, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS]), max_threads=1
    )
    words = xgrammar.allocate_token_bitmask(1, VOCAB_SIZE)
    for seed, expression in enumerate(EXPRESSIONS):
        grammar = grammar_of(generation_pb2.StructuredOutput(regex=expression), {})
        (matcher,) = compiler.start(grammar, [()]).matchers()
        other = xgrammar.GrammarMatcher(others.compile_regex(expression))
        rng, written = random.Random(seed), b""
        for _ in range(STEPS):
            ours = bits(matcher.matcher.compute_bitmask())
            other.fill_next_token_bitmask(words, 0)
            assert np.array_equal(ours, bits(words.numpy().tobytes())), (expression, written)
            token_id = int(rng.choice(np.flatnonzero(ours)))
            if token_id == EOS:
                break
            written += vocabulary.tokens[token_id]
            matcher.matcher.consume_token(token_id)
            assert other.accept_token(token_id)
    compiler.close()
