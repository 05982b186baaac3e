"""Recent answers, as a source of drafts for new ones that repeat them."""

from collections import OrderedDict
from collections.abc import Sequence

from scalellm.services.executor.engine.speculation.text_index import GRAM, Match, match_length

_MAX_TOKENS = 1 << 15  # of all answers: some ten megabytes
_MAX_ANSWER = 1 << 12


class FinishedAnswers:
    """The tokens of finished answers. The least recently useful ones are dropped for new ones.

    An answer is found only by requests with its cache salt, because another tenant could infer its content from the
    time that its own answers take.

    Args:
        max_tokens: Most tokens of all answers together.
    """

    def __init__(self, max_tokens: int = _MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._answers: OrderedDict[int, tuple[bytes, tuple[int, ...]]] = OrderedDict()
        self._num_added = 0
        # By salt and run of tokens: the number of an answer, and the index of the token that follows the run in it.
        self._next: dict[tuple[bytes, tuple[int, ...]], tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, salt: bytes, answer: Sequence[int]) -> None:
        """Keep the beginning of an answer, unless it is too short to match."""
        tokens = tuple(answer[: min(_MAX_ANSWER, self._max_tokens)])
        if len(tokens) <= GRAM:
            return
        self._num_added += 1
        number = self._num_added
        self._answers[number] = salt, tokens
        for at in range(GRAM, len(tokens)):
            self._next[salt, tokens[at - GRAM : at]] = number, at
        self._num_tokens += len(tokens)
        while self._num_tokens > self._max_tokens:
            self._forget()

    def find(self, salt: bytes, context: Sequence[int]) -> Match | None:
        """Return the latest occurrence of a context's last tokens in an answer with this salt; None if there
        is none.
        """
        place = self._next.get((salt, tuple(context[-GRAM:])))
        if place is None:
            return None
        number, at = place
        self._answers.move_to_end(number)
        answer = self._answers[number][1]
        return Match(answer, at, match_length(answer, at, context))

    def _forget(self) -> None:
        number, (salt, tokens) = self._answers.popitem(last=False)
        self._num_tokens -= len(tokens)
        for at in range(GRAM, len(tokens)):
            run = salt, tokens[at - GRAM : at]
            if run in self._next and self._next[run][0] == number:
                del self._next[run]
