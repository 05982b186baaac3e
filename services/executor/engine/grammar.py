"""The engine's view of grammars, which constrain the texts of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from scalellm.services.executor.engine.batch import ScheduledSequence


class GrammarError(Exception):
    """A grammar cannot be understood, or takes too long; the message is for the client to read."""


class Matcher(Protocol):
    """Follows the text of one sample through its grammar. Used by one thread at a time."""

    @property
    def is_slow(self) -> bool:
        """True if its masks take too long to be computed within a step: they are computed before it, elsewhere."""

    def has_mask(self, token_ids: Sequence[int], start: int = 0) -> bool:
        """Return whether the mask behind these tokens is there, for a slow matcher. If not it is computed from now on,
        and nothing else may be asked of the matcher until it is there.
        """

    def follow(self, token_ids: Sequence[int], start: int = 0) -> None:
        """Take note of the sample's tokens from `start` on, its output; those of earlier calls cost nothing again."""

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens the grammar allows to come next, in their order."""

    def forced(self) -> Sequence[int]:
        """Return tokens whose text must come next, none where there is a choice; the model may spell it otherwise."""


class Compilation(Protocol):
    """Matchers in the making, elsewhere."""

    @property
    def is_done(self) -> bool:
        """True once `matchers` returns or raises at once."""

    def matchers(self) -> Sequence[Matcher]:
        """Return one matcher per sample, each behind the sample's tokens. Raises GrammarError."""

    def cancel(self) -> None:
        """Nobody waits for it any more."""


class GrammarCompiler(Protocol):
    """Makes matchers without holding up the caller."""

    def start(self, grammar: str, outputs: Sequence[Sequence[int]]) -> Compilation:
        """Begin with one matcher per sample, given the tokens that each has emitted already."""


class StepMasks(Protocol):
    """The tokens that the samples of a step may go on with."""

    def fill(self, scheduled: Sequence[ScheduledSequence]) -> Mapping[int, str]:
        """Find them out, now that all tokens of these samples are known. Returns the messages of the grammars that gave
        an error, by place: what is drawn for these means nothing.
        """

    def pick(self, place: int, number: int) -> int:
        """Return one of the tokens that the sample at a place may go on with: that with this number, modulo how many
        there are; 0 if there is none.
        """
