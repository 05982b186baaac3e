"""One sample's tokens to the text its client sees: detokenised, up to the first stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.tokenizer.text.detokenizer import TokenTexts
from services.tokenizer.text.stop_strings import StopMatcher, StopStrings


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What a batch of tokens added.

    Attributes:
        text: New text; may be empty while a character or a possible stop string is incomplete.
        num_tokens: How many of the batch's tokens belong to the sample: all, or up to the one that completed `stop`.
        stop: The stop string that ended the sample, or None.
    """

    text: str
    num_tokens: int
    stop: str | None = None


class TextStream:
    """Detokeniser and stop matcher of one sample. Not safe for concurrent use.

    The token count stays exact when a batch of several tokens runs past a stop string, so the answer is the same
    however the tokens were batched on their way.
    """

    def __init__(
        self,
        texts: TokenTexts,
        stops: StopStrings | None = None,
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = texts.detokenizer(skip_special_tokens=skip_special_tokens)
        self._matcher = None if stops is None else StopMatcher(stops, include_stop=include_stop)

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Return what these tokens add. Not to be called after a delta with `stop`."""
        if self._matcher is None:
            return TextDelta(self._detokenizer.push(token_ids), len(token_ids))
        before = self._detokenizer.copy() if len(token_ids) > 1 else None
        new_text = self._detokenizer.push(token_ids)
        result = self._matcher.push(new_text)
        if result.stop is None:
            return TextDelta(result.text, len(token_ids))
        num_tokens = len(token_ids)
        if before is not None:
            # Replay the batch to find the token that brought the last character of the stop string.
            num_tokens, missing = 0, result.num_chars_read
            while missing > 0:
                missing -= len(before.push(token_ids[num_tokens : num_tokens + 1]))
                num_tokens += 1
        return TextDelta(result.text, num_tokens, result.stop)

    def flush(self) -> TextDelta:
        """Return what is left when no more tokens come. Even an unfinished character may complete a stop string."""
        rest = self._detokenizer.flush()
        if self._matcher is None:
            return TextDelta(rest, 0)
        result = self._matcher.push(rest)
        if result.stop is not None:
            return TextDelta(result.text, 0, result.stop)
        return TextDelta(result.text + self._matcher.flush(), 0)
