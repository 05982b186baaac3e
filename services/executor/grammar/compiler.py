"""Compiles grammars in a thread of its own, with limits on their cost."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from scalellm.services.common.vocabulary import Vocabulary
from scalellm.services.executor.engine.grammar import GrammarError
from scalellm.services.executor.grammar.matcher import LlMatcher, Pace, error_of

_NUM_KEPT = 32
"""Number of compiled grammars that are cached, because clients send the same one repeatedly."""

_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
"""Disables forced tokens: where only one text is possible, the model still chooses its division into tokens, because
this process has no tokenizer that could."""


_NICENESS = 15
"""Unix niceness of the threads that compile grammars and compute slow masks: beside busy steps each gets about a
thirtieth of a core. At 10 each got a tenth, which made all steps longer; at 19, the lowest priority, a thread waited
for seconds on a busy machine."""


class LlGrammarCompiler:
    """Makes matchers with llguidance, which releases the interpreter lock. All limits are on work, not on time, so that
    the refusal of a grammar depends neither on the machine nor on its load.

    Args:
        vocabulary: Vocabulary of the model.
        eos_token_ids: Tokens that end a sample. They may be drawn only where a text is complete.
    """

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: Collection[int]) -> None:
        # Masks have a thread of their own, because a running sample must not wait for the compilation of a new one.
        self._thread, self._mask_thread = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=_give_way)
            for name in ("grammar", "mask")
        )
        self._limits = LLParserLimits(
            # Work of compiling: some 20 ms.
            initial_lexer_fuel=1_000_000,
            max_grammar_size=100_000,
            # Work of one mask: mostly 5 ms at most, some 50 ms where a grammar is very ambiguous.
            step_lexer_fuel=50_000,
            step_max_items=20_000,
            # Memory: one or two kB each, for every sample.
            max_lexer_states=10_000,
            verbose_errors=False,
        )
        self._compiled: OrderedDict[str, tuple[LLMatcher, Pace]] = OrderedDict()
        # Takes a second for a large vocabulary, while the weights are loaded.
        self._tokenizer = self._thread.submit(_make_tokenizer, vocabulary, sorted(eos_token_ids))

    def start(self, grammar: str, outputs: Sequence[Sequence[int]]) -> LlCompilation:
        """Start a compilation with one matcher per sample, given the output tokens that each sample already has."""
        return LlCompilation(self._thread.submit(self._compile, grammar, outputs))

    def close(self) -> None:
        """End the threads."""
        self._thread.shutdown(cancel_futures=True)
        self._mask_thread.shutdown(cancel_futures=True)

    def _compile(self, grammar: str, outputs: Sequence[Sequence[int]]) -> list[LlMatcher]:
        """Compile a grammar, or take the cached one. Runs in the thread."""
        kept = self._compiled.pop(grammar, None) or (self._compile_anew(grammar), Pace())
        self._compiled[grammar] = kept
        if len(self._compiled) > _NUM_KEPT:
            self._compiled.popitem(last=False)
        compiled, pace = kept
        matchers = []
        for output in outputs:
            matcher = LlMatcher(compiled.deep_copy(), self._tokenizer.result(), self._mask_thread, pace)
            if output:
                matcher.follow(output)
                matcher.matcher.compute_bitmask()
                if message := matcher.error:
                    raise GrammarError(message)
            matchers.append(matcher)
        return matchers

    def _compile_anew(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer.result(), grammar + _OPTIONS, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask takes longest, and its copies profit from it
        if message := error_of(matcher):
            raise GrammarError(message)
        return matcher


class LlCompilation:
    """A compilation that runs in the thread."""

    def __init__(self, future: Future[list[LlMatcher]]) -> None:
        self._future = future

    @property
    def is_done(self) -> bool:
        """True once `matchers` returns or raises without waiting."""
        return self._future.done()

    def matchers(self) -> Sequence[LlMatcher]:
        """Return one matcher per sample. Raises GrammarError."""
        try:
            error = self._future.exception()
        except CancelledError:
            raise GrammarError("it was cancelled") from None
        if error is not None and not isinstance(error, Exception):
            raise RuntimeError(f"{type(error).__name__}: {error}") from error  # a panic of Rust is no Exception
        return self._future.result()

    def cancel(self) -> None:
        """Cancel the compilation. One that has begun is completed all the same."""
        self._future.cancel()


def _give_way() -> None:
    """Lower the calling thread's priority, because steps, which serve all requests, must not wait for one's grammar.

    Linux has a priority for each thread; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class _Spelling:
    """A vocabulary with the attributes that llguidance's LLTokenizer reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: Sequence[int]) -> None:
        self.tokens = vocabulary.tokens
        # End tokens are never text, even if the model's files do not list them as special.
        self.special_token_ids = sorted(vocabulary.special_ids | set(eos_token_ids))
        self.eos_token_id = eos_token_ids[0]
        self.tokenizer: LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Return tokens of a text. Called by llguidance where a grammar's author asks for tokens of a fixed text."""
        return [] if self.tokenizer is None else self.tokenizer.greedy_tokenize(text)


def _make_tokenizer(vocabulary: Vocabulary, eos_token_ids: Sequence[int]) -> LLTokenizer:
    spelling = _Spelling(vocabulary, eos_token_ids)
    tokenizer = LLTokenizer(spelling, eos_token=list(eos_token_ids))  # type: ignore[arg-type]
    spelling.tokenizer = tokenizer
    return tokenizer
