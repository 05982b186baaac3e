"""The engine's view of grammars, which constrain the texts of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from scalellm.services.executor.engine.batch import ScheduledSequence


class GrammarError(Exception):
    """A grammar is invalid or takes too long to compile. The message is meant for the client."""


class Matcher(Protocol):
    """Follows the text of one sample through its grammar. Used by one thread at a time."""

    @property
    def is_slow(self) -> bool:
        """True if its masks take too long for a step; they are computed in another thread before the step."""

    def has_mask(self, token_ids: Sequence[int], start: int = 0) -> bool:
        """For a slow matcher, return whether the mask after these tokens is available. If not, its computation starts,
        and no other method may be called until it is available.
        """

    def cancel(self) -> None:
        """Cancel the computation of a mask that has not begun, as the sample has ended. No other method is called after
        this one.
        """

    def follow(self, token_ids: Sequence[int], start: int = 0) -> None:
        """Advance through the sample's output tokens, `token_ids[start:]`. Tokens of earlier calls are skipped."""

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens, from the first on, the grammar allows next in this order."""

    def forced(self) -> Sequence[int]:
        """Return tokens of the text that must come next, empty if there is a choice. The model may divide that text
        into other tokens.
        """


class Compilation(Protocol):
    """A compilation that runs in another thread."""

    @property
    def is_done(self) -> bool:
        """True once `matchers` returns or raises without waiting."""

    def matchers(self) -> Sequence[Matcher]:
        """Return one matcher per sample, each advanced through the sample's tokens. Raises GrammarError."""

    def cancel(self) -> None:
        """Cancel the compilation, as its result is no longer needed."""


class GrammarCompiler(Protocol):
    """Makes matchers in another thread."""

    def start(self, grammar: str, outputs: Sequence[Sequence[int]]) -> Compilation:
        """Start a compilation with one matcher per sample, given the output tokens that each sample already has."""


class StepMasks(Protocol):
    """The grammars' masks for the samples of a step: the tokens that each may draw."""

    def fill(self, scheduled: Sequence[ScheduledSequence]) -> Mapping[int, str]:
        """Compute the masks, once all tokens of these samples are known. Returns the error messages of grammars by
        place in `scheduled`; the tokens drawn at these places are invalid.
        """

    def pick(self, place: int, number: int) -> int:
        """Return the allowed token of the sample at `place` whose index is `number` modulo the number of allowed
        tokens; 0 if none is allowed.
        """
