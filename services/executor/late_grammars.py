"""Grammars for the fake engine, which loads what they take when the first one comes."""

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
    """Compiler and masks. Loading them takes half a second of the CPU: too much at each start of a fake engine, which
    tests start often and mostly ask for no grammar.

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
        """Begin with one matcher per sample, given the tokens that each has emitted already."""
        try:
            return self._load()[0].start(grammar, outputs)
        except VocabularyError as error:
            return _Failed(str(error))

    def fill(self, scheduled: Sequence[ScheduledSequence]) -> Mapping[int, str]:
        """Find out what the samples of a step may go on with; see `Masks.fill`."""
        return self._load()[1].fill(scheduled)

    def pick(self, place: int, number: int) -> int:
        """Return one of the tokens that a sample may go on with; see `Masks.pick`."""
        return self._load()[1].pick(place, number)

    def _load(self) -> tuple[LlGrammarCompiler, Masks]:
        if self._loaded is None:
            from scalellm.services.executor.grammar import LlGrammarCompiler, Masks

            vocabulary = read_vocabulary(self._model, self._vocab_size)
            compiler = LlGrammarCompiler(vocabulary, self._eos_token_ids)
            self._loaded = compiler, Masks(self._num_rows, self._vocab_size)
        return self._loaded


class _Failed(Compilation):
    """No grammar can be compiled."""

    is_done = True

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def matchers(self) -> Sequence[Matcher]:
        raise GrammarError(self._reason)

    def cancel(self) -> None:
        """Nothing is under way."""
