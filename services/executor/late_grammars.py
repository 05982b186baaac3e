"""Grammars for the fake engine, which loads llguidance and the vocabulary with the first one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.services.common.vocabulary import VocabularyError, read_vocabulary
from scalellm.services.executor.engine.batch import ScheduledSequence
from scalellm.services.executor.engine.grammar import Compilation, GrammarCompiler, GrammarError, Matcher, StepMasks

if TYPE_CHECKING:
    from scalellm.services.executor.grammar import LlGrammarCompiler, Masks


class LateGrammars(GrammarCompiler, StepMasks):
    """Compiler and masks that are loaded on first use. Loading takes half a second of CPU time, and tests start many
    fake engines, most of them without a grammar.

    Args:
        model: Directory or file of the model whose vocabulary counts.
        num_rows: Most samples of a step.
        vocab_size: Tokens of the model.
        eos_token_ids: Tokens that end a sample.
    """

    def __init__(self, model: Path, num_rows: int, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._model = model
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._loaded: tuple[LlGrammarCompiler, Masks] | None = None

    def start(self, grammar: str, outputs: Sequence[Sequence[int]]) -> Compilation:
        """Start a compilation; see `LlGrammarCompiler.start`."""
        try:
            return self._load()[0].start(grammar, outputs)
        except VocabularyError as error:
            return _Failed(str(error))

    def fill(self, scheduled: Sequence[ScheduledSequence]) -> Mapping[int, str]:
        """Compute the masks of a step; see `Masks.fill`."""
        return self._load()[1].fill(scheduled)

    def pick(self, place: int, number: int) -> int:
        """Return an allowed token; see `Masks.pick`."""
        return self._load()[1].pick(place, number)

    def _load(self) -> tuple[LlGrammarCompiler, Masks]:
        if self._loaded is None:
            from scalellm.services.executor.grammar import LlGrammarCompiler, Masks

            vocabulary = read_vocabulary(self._model, self._vocab_size)
            compiler = LlGrammarCompiler(vocabulary, self._eos_token_ids)
            self._loaded = compiler, Masks(self._num_rows, self._vocab_size)
        return self._loaded


class _Failed(Compilation):
    """A compilation that fails because no grammar can be compiled."""

    is_done = True

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def matchers(self) -> Sequence[Matcher]:
        raise GrammarError(self._reason)

    def cancel(self) -> None:
        """Do nothing: there is no work to cancel."""
