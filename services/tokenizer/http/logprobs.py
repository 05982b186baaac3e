"""Log-probabilities in OpenAI's two formats, as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.tokenizer.http.wire import dump, quote
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.v1 import common_pb2, generation_pb2

_LOWEST = -9999.0
"""Log-probability for a probability of 0, as in vLLM, because JSON has no infinity."""


def _number(value: float) -> str:
    return repr(max(value, _LOWEST))


def chat_entries(token_ids: Sequence[int], values: common_pb2.TokenLogprobs, texts: TokenTexts, num_top: int) -> str:
    """Return entries of a chat's `logprobs.content`, with commas in between.

    Args:
        token_ids: Token ids of the answer.
        values: One entry per token.
        texts: Texts of the model's tokens.
        num_top: Alternatives to show.
    """
    entries = []
    for number, token_id in enumerate(token_ids):
        first = number * values.num_top
        top = ",".join(
            f"{{{_chat_token(values.top_token_ids[place], values.top_logprobs[place], texts)}}}"
            for place in range(first, first + min(num_top, values.num_top))
        )
        entries.append(f'{{{_chat_token(token_id, values.logprobs[number], texts)},"top_logprobs":[{top}]}}')
    return ",".join(entries)


def _chat_token(token_id: int, logprob: float, texts: TokenTexts) -> str:
    data = texts.bytes_of(token_id)
    token = quote(data.decode(errors="replace"))
    return f'"token":{token},"logprob":{_number(logprob)},"bytes":[{",".join(map(str, data))}]'


def prompt_entries(part: generation_pb2.PromptLogprobs, texts: TokenTexts, num_top: int) -> str:
    """Return entries of vLLM's `prompt_logprobs`, with commas in between.

    An entry is null for a prompt's first token, else the `num_top` most likely tokens and the prompt's own token, by
    their ids. The rank of the prompt's token is null if it is not among the most likely ones.
    """
    values, entries = part.logprobs, []
    for number, token_id in enumerate(part.token_ids):
        if not part.offset + number:
            entries.append("null")
            continue
        first = number * values.num_top
        places = range(first, first + min(num_top, values.num_top))
        ranked = {
            values.top_token_ids[place]: (values.top_logprobs[place], str(rank)) for rank, place in enumerate(places, 1)
        }
        ranked.setdefault(token_id, (values.logprobs[number], "null"))
        shown = (
            f'"{key}":{{"logprob":{_number(value)},"rank":{rank},"decoded_token":{quote(_text(key, texts))}}}'
            for key, (value, rank) in ranked.items()
        )
        entries.append(f"{{{','.join(shown)}}}")
    return ",".join(entries)


def _text(token_id: int, texts: TokenTexts) -> str:
    return texts.bytes_of(token_id).decode(errors="replace")


class CompletionLogprobs:
    """The `logprobs` of one completion: parallel lists.

    Args:
        texts: Texts of the model's tokens.
        num_top: Alternatives per token; 0: only the token itself.
        offset: Characters of the text before the first token.
    """

    def __init__(self, texts: TokenTexts, num_top: int, offset: int = 0) -> None:
        self._texts = texts
        self._num_top = num_top
        self._detokenizer = texts.detokenizer(skip_special_tokens=False)
        self._offset = offset
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._values: list[str] = []
        self._top: list[str] = []
        self._offsets: list[str] = []

    def add(self, token_ids: Sequence[int], values: common_pb2.TokenLogprobs, *, begins_text: bool = False) -> None:
        """Add tokens. With `begins_text` the first one has no log-probability, because no token precedes it."""
        for number, token_id in enumerate(token_ids):
            self._tokens.append(quote(_text(token_id, self._texts)))
            self._offsets.append(str(self._offset))
            self._offset += len(self._detokenizer.push((token_id,)))
            if begins_text and not number:
                self._values.append("null")
                self._top.append("null")
                continue
            logprob = values.logprobs[number]
            self._values.append(_number(logprob))
            if not self._num_top:
                self._top.append("null")
                continue
            first = number * values.num_top
            top = {
                _text(values.top_token_ids[place], self._texts): max(values.top_logprobs[place], _LOWEST)
                for place in reversed(range(first, first + min(self._num_top, values.num_top)))
            }
            top.setdefault(_text(token_id, self._texts), max(logprob, _LOWEST))
            self._top.append(dump(top))

    def take(self) -> str:
        """Return the entries that were added since the last call."""
        text = (
            f'{{"tokens":[{",".join(self._tokens)}],"token_logprobs":[{",".join(self._values)}],'
            f'"top_logprobs":[{",".join(self._top)}],"text_offset":[{",".join(self._offsets)}]}}'
        )
        self._clear()
        return text
