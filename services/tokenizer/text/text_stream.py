"""Conversion of one sample's tokens to text, up to the first stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.stop_strings import StopMatcher, StopStrings


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The text that a batch of tokens added.

    Attributes:
        text: New text; may be empty while a character or a possible stop string is incomplete.
        num_tokens: Number of the batch's tokens that belong to the sample: all, or up to the one that completed `stop`.
        stop: The stop string that ended the sample, or None.
    """

    text: str
    num_tokens: int
    stop: str | None = None


class TextStream:
    """Detokeniser and stop matcher of one sample. Not safe for concurrent use.

    The token count stays exact when a batch of several tokens runs past a stop string, so the answer is the same
    however the tokens were batched on their way.

    Args:
        texts: Texts of the model's tokens.
        stops: Stop strings, or None without any.
        skip_special_tokens: True if special tokens are left out of the text. A stop string that is exactly a special
            token's text matches that token all the same.
        include_stop: True if the stop string belongs to the text.
        min_tokens: First tokens among which no stop string may end. One may begin there.
    """

    def __init__(
        self,
        texts: TokenTexts,
        stops: StopStrings | None = None,
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = texts.detokenizer(skip_special_tokens=skip_special_tokens)
        self._matcher = None if stops is None else StopMatcher(stops, include_stop=include_stop)
        self._include_stop = include_stop
        self._num_passed = min_tokens  # number of following tokens among which no stop string may end
        self._skips_special_tokens = skip_special_tokens
        self._stop_tokens: dict[int, str] = {}
        if stops is not None:
            special_ids = texts.special_ids
            self._stop_tokens = {special_ids[stop]: stop for stop in stops.stops if stop in special_ids}

    def is_stop(self, token_id: int) -> bool:
        """True if the text of a special token is a stop string."""
        return token_id in self._stop_tokens

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Return the text that these tokens add. Must not be called after a delta with `stop`."""
        if self._matcher is None:
            return TextDelta(self._detokenizer.push(token_ids), len(token_ids))
        passed = min(self._num_passed, len(token_ids))
        text = ""
        if passed:
            self._num_passed -= passed
            text = self._matcher.push(self._detokenizer.push(token_ids[:passed]), passes_matches=True).text
            token_ids = token_ids[passed:]
        delta = self._match(self._matcher, token_ids)
        return TextDelta(text + delta.text, passed + delta.num_tokens, delta.stop)

    def flush(self) -> TextDelta:
        """Return the rest of the text, after the last tokens. Even an incomplete character may complete a stop
        string.
        """
        rest = self._detokenizer.flush()
        if self._matcher is None:
            return TextDelta(rest, 0)
        result = self._matcher.push(rest, passes_matches=self._num_passed > 0)
        if result.stop is not None:
            return TextDelta(result.text, 0, result.stop)
        return TextDelta(result.text + self._matcher.flush(), 0)

    def _match(self, matcher: StopMatcher, token_ids: Sequence[int]) -> TextDelta:
        """Read the tokens up to the first stop string, which may be text or a special token."""
        num_tokens = len(token_ids)
        if self._stop_tokens and self._skips_special_tokens:
            num_tokens = next((at for at, token_id in enumerate(token_ids) if self.is_stop(token_id)), num_tokens)
        delta = self._match_text(matcher, token_ids[:num_tokens])
        if num_tokens == len(token_ids) or delta.stop is not None:
            return delta
        rest = self.flush()
        if rest.stop is not None:
            return TextDelta(delta.text + rest.text, num_tokens, rest.stop)
        stop = self._stop_tokens[token_ids[num_tokens]]
        return TextDelta(delta.text + rest.text + (stop if self._include_stop else ""), num_tokens + 1, stop)

    def _match_text(self, matcher: StopMatcher, token_ids: Sequence[int]) -> TextDelta:
        before = self._detokenizer.copy() if len(token_ids) > 1 else None
        new_text = self._detokenizer.push(token_ids)
        result = matcher.push(new_text)
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
