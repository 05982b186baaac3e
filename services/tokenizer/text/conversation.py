"""Token ids of a conversation's next turn, such that the ids of earlier turns stay as they were.

Decoding tokens and encoding the text again need not give the same tokens, but a prefix cache is hit only by the same
ids, so a stored answer is never encoded again. A conversation is kept as segments, alternately prompts and answers,
each with its text and its exact ids. As long as the newly rendered text repeats a segment's text, its ids are kept. If
a template rewrites the past (trims an answer, drops its reasoning), only the segments from there on are lost.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from scalellm.services.tokenizer.text.content_as_text import MarkedText
from scalellm.services.tokenizer.text.detokenizer import TokenTexts


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a conversation: the text as the template writes it, and the ids the model was given or produced."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    """The next turn: segments whose ids stay as they were, and the new one."""

    kept: tuple[Segment, ...]
    new: Segment

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Everything the model reads, in order."""
        return (*self.kept, self.new)

    @property
    def token_ids(self) -> list[int]:
        """The ids of everything the model reads."""
        return [token_id for segment in self.segments for token_id in segment.token_ids]


def answer_segment(texts: TokenTexts, token_ids: Sequence[int], content: str) -> Segment:
    """Return the segment for an answer: `token_ids` as generated, `content` as the message holds it.

    Usually the segment has all tokens, the end token included. If text was cut off, for instance by a stop string, it
    has those up to the cut; the rest of `content` is encoded with the next turn.
    """
    visible = texts.detokenizer()
    if visible.push(token_ids) + visible.flush() == content:
        whole = texts.detokenizer(skip_special_tokens=False)
        return Segment(whole.push(token_ids) + whole.flush(), tuple(token_ids))
    detokenizer = texts.detokenizer(skip_special_tokens=False)
    length = kept_length = kept_tokens = 0
    for count, token_id in enumerate(token_ids, start=1):
        piece = detokenizer.push((token_id,))
        if not content.startswith(piece, length):
            break
        length += len(piece)
        if detokenizer.is_complete:  # only if the tokens so far end with a complete character
            kept_length, kept_tokens = length, count
    return Segment(content[:kept_length], tuple(token_ids[:kept_tokens]))


Encode = Callable[[MarkedText], Awaitable[list[int]]]


class ConversationEncoder:
    """Extends conversations of one model. Immutable.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        self._adds_prefix = _adds_prefix(tokenizer)

    async def extend(self, history: Sequence[Segment], rendered: MarkedText, encode: Encode) -> Continuation:
        """Return the next turn.

        Args:
            history: The conversation so far.
            rendered: The text of the whole conversation.
            encode: Encodes a text without the model's own surrounding tokens, which a template writes itself.
        """
        kept: list[Segment] = []
        position, text = 0, rendered.plain
        for segment in history:
            if not text.startswith(segment.text, position):
                break
            kept.append(segment)
            position += len(segment.text)
        rest = rendered.rest(position)
        ids = await self._encode_after(kept, rest, encode)
        if ids is None:
            return Continuation((), Segment(text, tuple(await encode(rendered))))
        return Continuation(tuple(kept), Segment(text[position:], tuple(ids)))

    async def _encode_after(self, kept: Sequence[Segment], rest: MarkedText, encode: Encode) -> list[int] | None:
        """Encode the text after the kept segments as it would be encoded within the whole text; None if that is
        impossible.

        Added tokens are split off before a text is encoded, so a cut next to one makes no difference. A cut elsewhere
        makes none that matters, except for a tokenizer that puts a space before every text.
        """
        last = next((segment.token_ids[-1] for segment in reversed(kept) if segment.token_ids), None)
        if last is None or not rest.text:
            return await encode(rest)
        if last in self._added:
            ids = await encode(rest.after(self._added[last]))
            if ids[:1] == [last]:
                return ids[1:]
        ids = await encode(rest)
        starts_with_added = bool(ids) and ids[0] in self._added and rest.text.startswith(self._added[ids[0]])
        return ids if starts_with_added or not self._adds_prefix else None


def _adds_prefix(tokenizer: Tokenizer) -> bool:
    """Return whether encoding puts a prefix, such as a space, before every text."""
    text = "x"
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return text != "x"
